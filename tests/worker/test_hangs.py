"""A stage that takes longer than it may ends the process, whichever it is; who only waits does not hang."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from broker_config import keys
from broker_config.exit_status import EXIT_BROKEN
from broker_config.settings import Settings
from producer import DecodeClient, JobHandle, JobStatus
from tests.chaos.crew import Member
from tests.support import worker_faults
from tests.support.processes import environment_of
from tests.support.thread_worker import ThreadWorker
from tests.support.wait import wait_until
from worker import fetch_stage

_numbers = itertools.count()
#: A decode of the tiny VAE takes milliseconds.
SHORT_S = 2.0


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"timeout_min_s": 0.1})


def submit(client: DecodeClient, **options: object) -> JobHandle:
    latents = np.ones((1, 4, 8, 8), dtype=np.float32)
    return client.submit(latents, vae="sd", provenance=False, **options)  # type: ignore[arg-type]


@pytest.fixture
def start(settings: Settings, tmp_path: Path) -> Iterator[Callable[[str], Member]]:
    """Starts a worker process with a fault."""
    started: list[Member] = []

    def start(fault: str) -> Member:
        environment = environment_of(settings) | {worker_faults.VARIABLE: fault}
        member = Member(kind="worker", number=next(_numbers), environment=environment, log=tmp_path / "worker.log")
        started.append(member)
        member.start()
        return member

    yield start
    for member in started:
        member.end()


def reap(client: DecodeClient, job: JobHandle) -> str:
    """What the janitor makes of a job whose worker is gone."""
    client.store.reap("janitor", quiet_s=3600)  # the first look starts a grace period
    client.store.connections.commands.hset(keys.REAPER, "grace_ms", 0)
    client.store.connections.commands.zadd(keys.LEASES, {job.id: 1})
    return client.store.reap("janitor", quiet_s=3600).jobs[job.id]


@pytest.mark.parametrize("stage", sorted(worker_faults.HANGS))
def test_a_hang_in_any_stage_ends_the_process(
    stage: str, client: DecodeClient, start: Callable[[str], Member], tmp_path: Path
) -> None:
    member = start(stage)
    assert submit(client).wait(60).status is JobStatus.SUCCEEDED
    job = submit(client, timeout_s=SHORT_S)
    assert member.wait() == EXIT_BROKEN
    assert f"exceeded its time in stage {stage}" in (tmp_path / "worker.log").read_text()
    if stage == "device":  # left to its lease: it may be what the device hangs in
        assert job.status() is JobStatus.PROCESSING
        assert reap(client, job) == "crashed"
    snapshot = job.snapshot()
    assert snapshot.status is JobStatus.QUEUED
    assert (snapshot.crash_count, snapshot.attempts) == ((1, 1) if stage == "device" else (0, 0))


def test_a_decode_that_takes_many_times_as_long_as_those_before_hangs_long_before_its_timeout(
    client: DecodeClient, start: Callable[[str], Member]
) -> None:
    member = start("device")
    assert submit(client, timeout_s=600.0).wait(60).status is JobStatus.SUCCEEDED
    job = submit(client, timeout_s=600.0)
    assert member.wait() == EXIT_BROKEN
    assert reap(client, job) == "crashed"


def test_a_job_on_the_device_is_not_marked_for_a_read_that_hangs(
    client: DecodeClient, start: Callable[[str], Member]
) -> None:
    member = start(worker_faults.BEHIND)
    decoding, reading = submit(client, timeout_s=600.0), submit(client)
    assert member.wait() == EXIT_BROKEN
    for job in (decoding, reading):
        snapshot = job.snapshot()
        assert (snapshot.status, snapshot.crash_count, snapshot.attempts) == (JobStatus.QUEUED, 0, 0)


def test_a_batch_that_waits_behind_a_slow_decode_does_not_hang(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_stage, "_FETCH_LIMIT_S", 1.0)
    admin = client.store.connections.commands
    jobs = [submit(client, timeout_s=600.0) for _ in range(2)]
    hung: list[str] = []
    with ThreadWorker(settings) as running:
        running.worker._leases._on_hang = lambda claim, stage: hung.append(stage)
        running.gate.close()
        assert running.gate.reached.wait(60)
        wait_until(lambda: admin.hget(keys.job(jobs[1].id), "stage") == b"ready", what="the second job to be ready")
        claimed_ms = jobs[1].snapshot().started_ms
        wait_until(
            lambda: (admin.zscore(keys.LEASES, jobs[1].id) or 0) - settings.lease_s * 1000 - claimed_ms > 1500,
            what="a renewal after the time that reading may take",
        )
        running.gate.open()
        assert [job.wait(60).status for job in jobs] == [JobStatus.SUCCEEDED] * 2
    assert hung == []


def test_a_ready_job_that_was_canceled_is_not_decoded(client: DecodeClient, settings: Settings) -> None:
    """Nobody has told the worker yet: it hears it when it says that the job goes on the device."""
    rarely = settings.model_copy(update={"lease_s": 600.0, "lease_renew_s": 300.0})
    jobs = [submit(client) for _ in range(2)]
    with ThreadWorker(rarely) as running:
        running.gate.close()
        assert running.gate.reached.wait(60)
        wait_until(lambda: jobs[1].status() is JobStatus.PROCESSING, what="the second job to be fetched")
        assert jobs[1].cancel() is JobStatus.PROCESSING
        running.gate.open()
        assert [job.wait(60).status for job in jobs] == [JobStatus.SUCCEEDED, JobStatus.CANCELED]
        assert len(running.gate.calls) == 1
