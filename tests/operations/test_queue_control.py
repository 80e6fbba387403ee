"""`pause`, `resume`, `drain` and `purge`: what stops, what goes on, and what others see of it."""

from __future__ import annotations

import pytest
import redis

from broker_config import keys
from broker_config.errors import InvalidOption, UnknownVae, WaitTimeout
from broker_config.job_status import JobStatus
from producer import DecodeClient
from producer.operations import DrainState, Operations
from tests.operations.conftest import Made, Run

# pause, resume -------------------------------------------------------------------------------------------


def test_a_paused_vae_is_claimed_by_nobody_until_it_is_resumed(made: Made, client: DecodeClient, cli: Run) -> None:
    made.queued("held")
    made.queued("free", "sd")
    assert cli("pause", "sdxl").stdout == "sdxl is paused\n"
    assert cli("pause", "sdxl").stdout == "sdxl was paused already\n"
    (claim,) = client.store.claim(token="first", worker="w", vaes=["sdxl", "sd"], max_jobs=8, max_px=10**9)
    assert claim.job_id == "free"
    assert client.store.claim(token="second", worker="w", vaes=["sdxl", "sd"]) == []

    made.queued("submitted-while-paused")
    assert cli("resume", "sdxl").stdout == "sdxl goes on\n"
    assert cli("resume", "sdxl").stdout == "sdxl was not paused\n"
    assert made.claimed("sdxl").job_id == "held"


@pytest.mark.parametrize("command", ["pause", "resume", "drain"])
def test_a_vae_that_does_not_exist_is_refused(cli: Run, command: str, admin: redis.Redis) -> None:
    assert isinstance(cli(command, "sdlx").exception, UnknownVae)
    assert not admin.exists(keys.PAUSED)


def test_a_vae_of_another_hosts_catalogue_can_be_paused_once_it_has_a_queue(cli: Run, admin: redis.Redis) -> None:
    admin.sadd(keys.RQ_QUEUES, keys.rq_queue("latentq.theirs.normal"))
    assert cli("pause", "theirs").exit_code == 0
    assert cli("resume", "theirs").exit_code == 0


# drain ---------------------------------------------------------------------------------------------------


def test_drain_waits_for_what_is_queued_and_what_is_processing(made: Made, client: DecodeClient) -> None:
    made.queued("waits")
    claim = made.claimed()
    made.queued("waits-2")
    states = Operations(client).drain("sdxl", poll_s=0.01)
    assert next(states) == DrainState(queued=1, processing=1, held_back=0, unserved=("sdxl",))
    client.job("waits-2").cancel()
    assert next(states) == DrainState(queued=0, processing=1, held_back=0, unserved=())
    client.store.fail(claim, {"code": "x", "message": "x"}, retryable=False, traceback="")
    assert next(states).done
    assert list(states) == []


def test_drain_of_one_vae_does_not_wait_for_another(made: Made, cli: Run) -> None:
    made.queued("waits")
    result = cli("drain", "sd", "--timeout", "0")
    assert (result.exit_code, result.stdout) == (0, "0 queued, 0 processing\n")


def test_drain_gives_up_after_its_timeout_and_says_what_is_left(made: Made, cli: Run) -> None:
    made.processing("runs")
    made.queued("waits", "sd")
    result = cli("drain", "--timeout", "0")
    assert result.stdout == "1 queued, 1 processing; no worker serves sd\n"
    assert isinstance(result.exception, WaitTimeout)
    assert "1 jobs are queued and 1 processing" in str(result.exception)


def test_of_a_paused_vae_only_what_is_processing_is_waited_for(made: Made, client: DecodeClient, cli: Run) -> None:
    claim = made.processing("runs")
    made.queued("stays")
    cli("pause", "sdxl")
    assert isinstance(cli("drain", "sdxl", "--timeout", "0").exception, WaitTimeout)
    client.store.fail(claim, {"code": "x", "message": "x"}, retryable=False, traceback="")
    assert cli("drain", "sdxl").stdout == "0 queued, 0 processing; 1 of paused VAEs stay queued\n"
    assert client.job("stays").status() is JobStatus.QUEUED


# purge ---------------------------------------------------------------------------------------------------


def test_purge_cancels_what_waits_in_one_queue_and_nothing_else(made: Made, client: DecodeClient, cli: Run) -> None:
    running = made.processing("runs")
    for number in range(3):
        made.queued(f"waits-{number}")
    made.queued("urgent", priority="high")
    made.queued("other", "sd")
    result = cli("purge", "sdxl.normal", "--yes")
    assert (result.exit_code, result.stdout) == (0, "canceled 3 jobs\n")

    def status(job_id: str) -> JobStatus:
        return client.job(job_id).status()

    assert [status(f"waits-{number}") for number in range(3)] == [JobStatus.CANCELED] * 3
    assert (status("urgent"), status("other")) == (JobStatus.QUEUED, JobStatus.QUEUED)
    assert status("runs") is JobStatus.PROCESSING
    assert not client.job("runs").snapshot().cancel_requested
    assert client.store.fail(running, {"code": "x", "message": "x"}, retryable=False, traceback="") == "failed"


@pytest.mark.parametrize("name", ["sdxl", "sdxl.low", "latentq.sdxl.low"])
def test_purge_takes_a_vae_a_queue_or_rqs_name_of_it(made: Made, client: DecodeClient, cli: Run, name: str) -> None:
    made.queued("waits", priority="low")
    assert cli("purge", name, "--yes").stdout == "canceled 1 job\n"
    assert client.job("waits").status() is JobStatus.CANCELED


def test_a_purged_job_wakes_its_waiter_frees_admission_and_keeps_its_latents_for_their_retention(
    made: Made, client: DecodeClient, cli: Run, admin: redis.Redis
) -> None:
    made.queued("waits", retention_s=500)
    cli("purge", "sdxl", "--yes")
    assert client.job("waits").wait(timeout=10).status is JobStatus.CANCELED
    assert admin.hgetall(keys.TOTALS) == {b"jobs": b"0", b"latents_bytes": b"0", b"reserved_bytes": b"0", b"px": b"0"}
    (blob,) = admin.scan_iter(keys.blob("waits*"))
    assert 490 <= admin.ttl(blob) <= 500
    assert admin.zcard(keys.rq_registry("canceled", "latentq.sdxl.normal")) == 1
    assert client.redecode("waits", job_id="again").id == "again"


def test_purge_asks_first_and_names_the_number(made: Made, client: DecodeClient, cli: Run) -> None:
    made.queued("one")
    made.queued("two", priority="low")
    result = cli("purge", "sdxl", text="n\n")
    assert result.exit_code == 1
    assert "Cancel 2 waiting jobs (1 in latentq.sdxl.normal, 1 in latentq.sdxl.low)?" in result.stdout
    assert client.job("one").status() is JobStatus.QUEUED
    assert cli("purge", "sdxl", text="y\n").exit_code == 0
    assert client.job("two").status() is JobStatus.CANCELED


def test_a_job_that_a_worker_takes_between_listing_and_canceling_goes_on(made: Made, client: DecodeClient) -> None:
    for job_id in ("taken", "waits"):
        made.queued(job_id)
    operations = Operations(client)
    waiting = operations.waiting(operations.queue_names("sdxl"))
    claim = made.claimed()
    purged = operations.purge(waiting)
    assert (purged.canceled, purged.taken, purged.foreign) == (1, 1, 0)
    assert client.store.renew("worker-1", []) == []
    snapshot = client.job("taken").snapshot()
    assert (claim.job_id, snapshot.status, snapshot.cancel_requested) == ("taken", JobStatus.PROCESSING, False)


def test_purge_takes_parked_jobs_too(made: Made, client: DecodeClient, cli: Run, admin: redis.Redis) -> None:
    made.queued("parked")
    admin.hset(keys.job("parked"), "schema", 99)
    assert client.store.claim(token="token", worker="old", vaes=["sdxl"]) == []
    assert cli("purge", "sdxl", "--yes").stdout == "canceled 1 job\n"
    assert not admin.exists(keys.PARKED)
    assert client.job("parked").status() is JobStatus.CANCELED


def test_purge_drops_entries_behind_which_nothing_waits_and_leaves_other_programs_jobs(
    made: Made, cli: Run, admin: redis.Redis
) -> None:
    made.failed("ended")
    queue = keys.rq_queue("latentq.sdxl.normal")
    admin.hset(keys.rq_job("foreign"), mapping={"origin": "latentq.sdxl.normal", "status": "queued"})
    admin.rpush(queue, "ended", "never-was", "foreign")
    made.queued("waits")
    admin.rpush(queue, "waits")  # twice in the list
    result = cli("purge", "sdxl", "--yes")
    assert result.stdout == "canceled 1 job\n"
    assert "1 job of other programs" in result.stderr
    assert admin.lrange(queue, 0, -1) == [b"foreign"]
    admin.delete(queue, keys.rq_job("foreign"))


def test_purge_of_an_empty_queue_does_nothing_and_does_not_ask(cli: Run) -> None:
    assert cli("purge", "sdxl.high").stdout == "nothing waits in sdxl.high\n"


@pytest.mark.parametrize(("name", "error"), [("sdlx", UnknownVae), ("sdxl.urgent", InvalidOption), ("", UnknownVae)])
def test_purge_of_what_is_no_queue_is_refused(cli: Run, name: str, error: type[Exception]) -> None:
    assert isinstance(cli("purge", name, "--yes").exception, error)


def test_more_jobs_than_one_round_trip_takes_are_all_canceled(made: Made, client: DecodeClient, cli: Run) -> None:
    for number in range(450):
        made.queued(f"job-{number}")
    assert cli("purge", "sdxl", "--yes").stdout == "canceled 450 jobs\n"
    assert client.store.claim(token="token", worker="w", vaes=["sdxl"]) == []
