"""`requeue-failed` makes one new job from each failed one's retained latents, however often it runs."""

from __future__ import annotations

import json

import pytest
import redis

from broker_config import keys
from broker_config.errors import QueueFull
from broker_config.job_status import JobStatus
from broker_config.messages import JOB_ID
from broker_config.settings import Settings
from producer import DecodeClient
from producer.operations import Operations, retry_id
from tests.operations.conftest import Made, Run


@pytest.mark.parametrize(
    ("job_id", "expected"),
    [
        ("cat", "cat-r1"),
        ("cat-r1", "cat-r2"),
        ("cat-r9", "cat-r10"),
        ("cat-raw", "cat-raw-r1"),
        ("01a206f8-3a06-706d-985c-8ffcba93a98b", "01a206f8-3a06-706d-985c-8ffcba93a98b-r1"),
        ("x" * 58, "x" * 58 + "-r1"),
    ],
)
def test_the_new_id_follows_from_the_failed_one(job_id: str, expected: str) -> None:
    assert retry_id(job_id) == expected


def test_the_new_id_of_a_long_one_fits_and_stays_its_own() -> None:
    one, other = retry_id("x" * 63 + "a"), retry_id("x" * 63 + "b")
    assert one != other
    assert JOB_ID.fullmatch(one)
    assert one.endswith("-r1")
    assert retry_id(one) == one.removesuffix("1") + "2"


def test_each_failed_job_is_made_once_however_often_it_is_asked_for(made: Made, client: DecodeClient, cli: Run) -> None:
    made.failed("one", output="webp", timeout_s=66.0, metadata={"prompt": "a cat"})
    made.failed("two")
    made.succeeded("fine")
    result = cli("requeue-failed")
    assert result.stdout == "one → one-r1\ntwo → two-r1\n"
    assert result.stderr == "2 queued\n"
    again = cli("requeue-failed")
    assert (again.stdout, again.stderr) == ("", "2 already there\n")

    request = client.job("one-r1").snapshot().request
    assert request is not None
    assert (request.output, request.timeout_s, request.metadata) == ("webp", 66.0, {"prompt": "a cat"})
    assert (request.source_job_id, request.priority) == ("one", "normal")
    assert [made.claimed().job_id, made.claimed().job_id] == ["one-r1", "two-r1"]
    assert client.store.claim(token="nothing-left", worker="w", vaes=["sdxl"]) == []
    assert client.job("one").status() is JobStatus.FAILED


def test_a_retry_that_failed_too_is_tried_again_and_its_source_is_not(
    made: Made, client: DecodeClient, cli: Run
) -> None:
    made.failed("cat")
    cli("requeue-failed")
    client.store.fail(made.claimed(), {"code": "x", "message": "x"}, retryable=False, traceback="")
    assert cli("requeue-failed").stdout == "cat-r1 → cat-r2\n"
    assert made.claimed().job_id == "cat-r2"


def test_a_retry_that_is_done_and_freed_is_not_made_again(made: Made, client: DecodeClient, cli: Run) -> None:
    made.failed("cat")
    cli("requeue-failed")
    client.job("cat-r1").cancel()
    client.job("cat-r1").ack()
    assert client.job("cat-r1").status() is JobStatus.EXPIRED
    assert cli("requeue-failed").stderr == "1 already there\n"


def test_an_id_that_a_caller_gave_to_other_latents_is_not_taken_for_the_retry(
    made: Made, client: DecodeClient, cli: Run
) -> None:
    made.failed("cat")
    made.succeeded("cat-r1")
    result = cli("requeue-failed")
    old, _, new = result.stdout.strip().partition(" → ")
    assert old == "cat"
    assert new not in ("cat-r1", "cat")
    request = client.job(new).snapshot().request
    assert request is not None
    assert request.source_job_id == "cat"
    assert cli("requeue-failed").stderr == "1 already there\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--vae", "sd"], ["on-sd"]),
        (["--code", "out_of_memory"], ["memory-1", "memory-2"]),
        (["--code", "out_of_memory", "--limit", "1"], ["memory-1"]),
        (["--code", "no_such_code"], []),
    ],
)
def test_it_can_be_narrowed_by_vae_code_and_number(
    made: Made, cli: Run, arguments: list[str], expected: list[str]
) -> None:
    # In the order in which their retention ends.
    made.failed("memory-2", code="out_of_memory", retention_s=2000)
    made.failed("memory-1", code="out_of_memory", retention_s=1000)
    made.failed("on-sd", "sd", retention_s=3000)
    lines = cli("requeue-failed", *arguments).stdout.splitlines()
    assert [line.partition(" → ")[0] for line in lines] == expected


def test_the_limit_counts_new_jobs_so_that_the_next_call_takes_the_next_ones(made: Made, cli: Run) -> None:
    for number in range(3):
        made.failed(f"job-{number}", retention_s=1000 + number)
    calls = [cli("requeue-failed", "--limit", "2").stdout.splitlines() for _ in range(3)]
    assert calls == [["job-0 → job-0-r1", "job-1 → job-1-r1"], ["job-2 → job-2-r1"], []]


def test_a_job_whose_latents_are_gone_is_counted_and_the_others_are_made(
    made: Made, cli: Run, admin: redis.Redis
) -> None:
    made.failed("gone", retention_s=1000)
    made.failed("there", retention_s=2000)
    for key in (*admin.scan_iter(keys.blob("gone*")), *admin.scan_iter(keys.owners("gone*"))):
        admin.delete(key)
    result = cli("requeue-failed")
    assert result.stdout == "there → there-r1\n"
    assert result.stderr == "1 latents are gone, 1 queued\n"


def test_a_job_whose_vae_is_no_longer_in_the_catalogue_is_refused_by_name(
    made: Made, cli: Run, admin: redis.Redis
) -> None:
    made.failed("old-vae")
    message = json.loads(admin.hget(keys.job("old-vae"), "message") or "{}") | {"vae": "sdxl-2019"}
    admin.hset(keys.job("old-vae"), "message", json.dumps(message))
    result = cli("requeue-failed")
    assert "old-vae: refused: no VAE 'sdxl-2019' in the catalogue" in result.stderr
    assert result.stderr.endswith("1 refused\n")


def test_a_full_queue_stops_it_and_what_was_made_is_known(made: Made, client: DecodeClient, settings: Settings) -> None:
    made.failed("first", retention_s=1000)
    made.failed("second", retention_s=2000)
    narrow = DecodeClient(client.store.connections, settings=settings.model_copy(update={"max_pending_jobs": 1}))
    requeued = Operations(narrow).requeue_failed()
    assert next(requeued).new_id == "first-r1"
    with pytest.raises(QueueFull):
        next(requeued)
    client.job("first-r1").cancel()
    assert [item.new_id for item in Operations(narrow).requeue_failed() if item.outcome == "queued"] == ["second-r1"]
