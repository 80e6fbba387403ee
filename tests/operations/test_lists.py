"""`latentq queues`, `workers` and `jobs` show what is there, in numbers counted by hand."""

from __future__ import annotations

import json

import pytest
import redis

from broker_config import keys
from broker_config.errors import InvalidOption
from broker_config.job_list import JobList
from broker_config.job_status import JobStatus
from broker_config.queue_report import QueueReport
from producer import DecodeClient
from tests.operations.conftest import LATENTS, Made, Run, parsed


def test_queues_shows_depth_processing_failed_workers_and_pause_of_each(made: Made, cli: Run) -> None:
    made.failed("broken")
    made.processing("running")
    for number in range(3):
        made.queued(f"waits-{number}")
    made.queued("urgent", priority="high")
    made.queued("held", "sd")
    made.serving("worker-1", "sdxl")
    made.serving("worker-2", "sdxl")
    assert cli("pause", "sd").stdout == "sd is paused\n"

    rows = {row["name"]: row for row in parsed(cli("queues", "--json"))}

    def shown(name: str) -> list[object]:
        row = rows[f"latentq.{name}"]
        return [row[key] for key in ("queued", "processing", "failed", "parked", "workers", "paused")]

    assert list(rows) == ["latentq.sd.normal", "latentq.sdxl.high", "latentq.sdxl.normal"]
    assert shown("sdxl.normal") == [3, 1, 1, 0, 2, False]
    assert shown("sdxl.high") == [1, 0, 0, 0, 2, False]
    assert shown("sd.normal") == [1, 0, 0, 0, 0, True]
    assert [line.split()[:3] for line in cli("queues").stdout.splitlines()[1:]] == [
        ["sd", "normal", "1"],
        ["sdxl", "high", "1"],
        ["sdxl", "normal", "3"],
    ]


def test_the_oldest_age_is_since_the_submit_also_when_a_job_came_back_to_the_head(
    made: Made, client: DecodeClient, admin: redis.Redis
) -> None:
    claim = made.processing("came-back")
    made.queued("younger")
    client.store.release([claim])
    now_ms = client.store.now_ms()
    admin.hset(keys.job("came-back"), "submitted_ms", now_ms - 60_000)
    admin.hset(keys.job("younger"), "submitted_ms", now_ms - 90_000)
    (queue,) = QueueReport(client.store.connections).queues()
    assert queue.oldest_s == pytest.approx(90, abs=5)


def test_a_paused_vae_is_listed_even_if_it_never_had_a_job(cli: Run) -> None:
    cli("pause", "flux")
    (row,) = parsed(cli("queues", "--json"))
    assert (row["vae"], row["queued"], row["paused"], row["oldest_s"]) == ("flux", 0, True, None)


def test_queues_of_other_programs_are_not_listed(admin: redis.Redis, made: Made, cli: Run) -> None:
    made.queued("ours")
    admin.sadd(keys.RQ_QUEUES, "rq:queue:default", "rq:queue:latentq.sdxl.urgent", "rq:queue:latentq.")
    assert [row["name"] for row in parsed(cli("queues", "--json"))] == ["latentq.sdxl.normal"]


def test_workers_shows_what_each_reported_and_none_that_is_dead(made: Made, cli: Run, admin: redis.Redis) -> None:
    made.serving("busy", "sdxl", "flux", busy_s=75.0, idle_s=25.0, jobs=12, held=3, device="cuda:1")
    made.serving("new", "sd", busy_s=0.0, idle_s=0.0, jobs=0, held=0, device="cpu")
    made.serving("dead", "sd")
    admin.delete(keys.worker("dead"))
    busy, new = parsed(cli("workers", "--json"))
    assert busy.pop("seen_s") < 60
    assert busy == {
        "name": "busy", "vaes": ["sdxl", "flux"], "device": "cuda:1", "pid": 4711, "busy_s": 75.0, "idle_s": 25.0,
        "jobs": 12, "held": 3, "busy_share": 0.75,
    }  # fmt: skip
    assert new["busy_share"] is None
    lines = [line.split() for line in cli("workers").stdout.splitlines()]
    assert lines[0] == ["name", "VAEs", "device", "busy", "jobs", "held", "seen"]
    assert lines[1][:7] == ["busy", "sdxl,", "flux", "cuda:1", "75%", "12", "3"]
    assert lines[2][:5] == ["new", "sd", "cpu", "0", "0"]


def test_a_worker_of_a_vae_unknown_here_is_found_through_rqs_list(made: Made, cli: Run, admin: redis.Redis) -> None:
    made.serving("elsewhere", "secret-vae")
    assert parsed(cli("workers", "--json")) == []
    admin.sadd(keys.RQ_WORKERS, keys.rq_worker("elsewhere"), keys.rq_worker("someone-elses"))
    assert [row["name"] for row in parsed(cli("workers", "--json"))] == ["elsewhere"]


@pytest.fixture
def one_of_each(made: Made) -> None:
    """Five jobs, oldest first: failed, succeeded, canceled, processing (sdxl) and queued (sd)."""
    made.failed("a-failed", code="out_of_memory")
    made.succeeded("b-succeeded", output="jpg")
    made.canceled("c-canceled")
    made.processing("d-processing")
    made.queued("e-queued", "sd", priority="low")


@pytest.mark.usefixtures("one_of_each")
def test_jobs_lists_every_job_newest_first(cli: Run) -> None:
    rows = parsed(cli("jobs", "--json"))
    assert [(row["job_id"], row["status"]) for row in rows] == [
        ("e-queued", "queued"),
        ("d-processing", "processing"),
        ("c-canceled", "canceled"),
        ("b-succeeded", "succeeded"),
        ("a-failed", "failed"),
    ]
    newest, oldest = rows[0], rows[-1]
    assert (newest["vae"], newest["priority"], newest["output"], newest["width"]) == ("sd", "low", "png", 16)
    assert (oldest["error_code"], oldest["error_message"], oldest["attempts"]) == (
        "out_of_memory",
        "it said out_of_memory",
        1,
    )
    assert rows[1]["worker"] == "worker-1"


@pytest.mark.usefixtures("one_of_each")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--status", "failed"], ["a-failed"]),
        (["--status", "succeeded"], ["b-succeeded"]),
        (["--status", "canceled"], ["c-canceled"]),
        (["--status", "processing"], ["d-processing"]),
        (["--status", "queued"], ["e-queued"]),
        (["--vae", "sd"], ["e-queued"]),
        (["--vae", "sdxl", "--limit", "2"], ["d-processing", "c-canceled"]),
        (["--vae", "sd", "--status", "failed"], []),
    ],
)
def test_jobs_can_be_narrowed_by_state_vae_and_number(cli: Run, arguments: list[str], expected: list[str]) -> None:
    assert [row["job_id"] for row in parsed(cli("jobs", *arguments, "--json"))] == expected


def test_expired_jobs_are_refused_with_the_way_to_find_one(cli: Run) -> None:
    result = cli("jobs", "--status", "expired")
    assert isinstance(result.exception, InvalidOption)
    assert "latentq status ID" in str(result.exception)


def test_a_job_past_its_retention_is_not_listed_as_what_it_was(
    made: Made, client: DecodeClient, admin: redis.Redis
) -> None:
    made.failed("due")
    admin.hset(keys.job("due"), "expires_ms", client.store.now_ms() - 1000)
    jobs = JobList(client.store.connections)
    assert jobs.newest(status=JobStatus.FAILED) == []
    assert [row.status for row in jobs.newest()] == [JobStatus.EXPIRED]


def test_a_parked_job_is_listed_although_its_message_cannot_be_read(
    made: Made, client: DecodeClient, admin: redis.Redis, cli: Run
) -> None:
    made.queued("from-the-future")
    message = json.loads(admin.hget(keys.job("from-the-future"), "message") or b"{}") | {"schema_version": 99}
    admin.hset(keys.job("from-the-future"), mapping={"schema": 99, "message": json.dumps(message)})
    assert client.store.claim(token="token", worker="old", vaes=["sdxl"]) == []  # and so it is parked
    (row,) = parsed(cli("jobs", "--json"))
    assert (row["job_id"], row["status"], row["vae"]) == ("from-the-future", "queued", "sdxl")
    assert "output" not in row
    assert [(queue["queued"], queue["parked"]) for queue in parsed(cli("queues", "--json"))] == [(0, 1)]


def test_jobs_of_other_programs_in_our_queues_are_not_listed(made: Made, cli: Run, admin: redis.Redis) -> None:
    made.queued("ours")
    admin.rpush(keys.rq_queue("latentq.sdxl.normal"), "not-ours")
    assert [row["job_id"] for row in parsed(cli("jobs", "--json"))] == ["ours"]


def test_among_many_the_newest_are_listed(client: DecodeClient, cli: Run) -> None:
    for number in range(230):
        client.submit(LATENTS, vae="sdxl", job_id=f"job-{number:03}")
    assert [row["job_id"] for row in parsed(cli("jobs", "--limit", "3", "--json"))] == ["job-229", "job-228", "job-227"]
    assert len(parsed(cli("jobs", "--limit", "225", "--json"))) == 225


@pytest.mark.parametrize(("command", "words"), [("queues", "nothing was submitted"), ("jobs", "no jobs")])
def test_an_empty_list_is_said_on_standard_error(cli: Run, command: str, words: str) -> None:
    result = cli(command)
    assert (result.exit_code, result.stdout) == (0, "")
    assert words in result.stderr
    assert parsed(cli(command, "--json")) == []


def test_without_workers_the_way_to_start_one_is_said(cli: Run) -> None:
    assert "latentq worker --vae" in cli("workers").stderr
