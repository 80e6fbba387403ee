"""When a worker claims its next batch."""

from __future__ import annotations

import numpy as np
import pytest

from broker_config.settings import Settings
from producer import DecodeClient, JobHandle, JobStatus
from tests.support.thread_worker import ThreadWorker
from tests.support.wait import wait_until
from worker.next_claim import NextClaim


class Clock:
    """Stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def next_claim(clock: Clock) -> NextClaim:
    """The device has taken nothing yet, and the first batch is claimed."""
    made = NextClaim(clock=clock)
    assert made.wait(0)
    return made


def test_one_batch_at_a_time(next_claim: NextClaim) -> None:
    assert not next_claim.wait(0)
    next_claim.device_is_free()  # the batch that was claimed is on its way
    assert not next_claim.wait(0)
    next_claim.taken(expected_s=0.0)
    assert next_claim.wait(0)
    assert not next_claim.wait(0)


def test_the_next_one_is_claimed_near_the_end_of_a_long_decode(next_claim: NextClaim, clock: Clock) -> None:
    next_claim.prepared(2.0)
    next_claim.taken(expected_s=60.0)
    clock.now += 54.9  # a second before the end, and twice what preparing took
    assert not next_claim.wait(0)
    clock.now += 0.2
    assert next_claim.wait(0)


def test_a_device_that_is_done_early_does_not_wait(next_claim: NextClaim) -> None:
    next_claim.taken(expected_s=60.0)
    assert not next_claim.wait(0)
    next_claim.device_is_free()
    assert next_claim.wait(0)


def test_a_decode_that_cannot_be_foreseen_or_is_short(next_claim: NextClaim) -> None:
    for expected_s in (0.0, 0.9):
        next_claim.taken(expected_s=expected_s)
        assert next_claim.wait(0)


def test_a_vae_that_may_have_to_be_loaded_first(clock: Clock) -> None:
    next_claim = NextClaim(may_load=lambda: True, clock=clock)
    assert next_claim.wait(0)
    next_claim.taken(expected_s=60.0)
    assert next_claim.wait(0)


def test_waiting_ends_when_the_time_has_come() -> None:
    next_claim = NextClaim()
    assert next_claim.wait(0)
    next_claim.taken(expected_s=1.05)
    assert next_claim.wait(60)


def submit(client: DecodeClient) -> JobHandle:
    return client.submit(np.ones((1, 4, 8, 8), dtype=np.float32), vae="sd", output="png")


def test_no_job_waits_behind_a_long_decode_while_another_worker_idles(client: DecodeClient, settings: Settings) -> None:
    with ThreadWorker(settings, name="long") as long:
        long.worker._device._pace.learn("sd", "decode", pixels=1, seconds=60.0)
        long.gate.close()
        held = submit(client)
        assert long.gate.reached.wait(60)
        waiting = submit(client)
        with ThreadWorker(settings, name="idle") as idle:
            assert waiting.wait(60).status is JobStatus.SUCCEEDED
            assert len(idle.gate.calls) == 1
        assert held.status() is JobStatus.PROCESSING
        after = submit(client)
        assert after.status() is JobStatus.QUEUED
        long.gate.open()
        for job in (held, after):
            assert job.wait(60).status is JobStatus.SUCCEEDED
        assert len(long.gate.calls) == 2


def test_where_nothing_is_known_the_next_job_is_fetched_at_once(client: DecodeClient, settings: Settings) -> None:
    with ThreadWorker(settings) as running:
        running.gate.close()
        jobs = [submit(client) for _ in range(2)]
        wait_until(lambda: jobs[1].status() is JobStatus.PROCESSING, what="the next job to be fetched")
        running.gate.open()
        assert [job.wait(60).status for job in jobs] == [JobStatus.SUCCEEDED] * 2
