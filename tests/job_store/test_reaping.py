"""Leases that end."""

from __future__ import annotations

import pytest

from broker_config import keys
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.messages import Mode
from tests.support.broker_contents import assert_same, everything
from tests.support.store_queue import NO_OUTAGE_S, PX, SHORT_S, Queue
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

# Reap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["claimed", "fetch", "finish"])
def test_a_job_that_was_not_on_the_device_of_a_dead_worker_goes_back_unmarked_and_first(
    queue: Queue, stage: str
) -> None:
    job, other = queue.submit_many(2)
    dead = queue.worker("dead", lease_s=SHORT_S)
    claim = dead.claim_one()
    if stage != "claimed":
        dead.renew(claim, stage=stage)
    assert queue.reap() == {job: "requeued"}
    assert queue.waiting() == [job, other]
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.crash_count, snapshot.error_count) == (JobStatus.QUEUED, 0, 0)


def test_the_jobs_of_a_dead_workers_batch_go_back_in_their_order(queue: Queue) -> None:
    jobs = [queue.submit(job) for job in ("a", "b", "c", "d")]
    queue.worker("dead", lease_s=SHORT_S).claim(mode=Mode.FAST, max_jobs=3, max_px=100 * PX)
    queue.reap()
    assert queue.waiting() == jobs


def test_a_job_that_kills_its_workers_fails_after_the_crashes_it_may_have(queue: Queue) -> None:
    job = queue.submit()
    store = queue.store(lease_s=SHORT_S, max_crashes=2)
    dead = StoreWorker(store, name="dead")
    outcomes = []
    for _ in range(2):
        dead.renew(dead.claim_one(), stage="device")
        outcomes.append(queue.reap(store)[job])
    assert outcomes == ["crashed", "failed"]
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.crash_count, snapshot.error_count) == (JobStatus.FAILED, 2, 0)
    assert [(error["code"], error["worker"], error["attempt"]) for error in snapshot.errors] == [
        ("worker_crashed", "dead", 1),
        ("worker_crashed", "dead", 2),
    ]


def test_looking_again_counts_no_crash_twice(queue: Queue) -> None:
    job = queue.submit()
    store = queue.store(lease_s=SHORT_S)
    dead = StoreWorker(store, name="dead")
    dead.renew(dead.claim_one(), stage="device")
    assert queue.reap(store) == {job: "crashed"}
    before = everything(queue.admin, but={keys.REAPER})
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs == {}
    assert_same(before, everything(queue.admin, but={keys.REAPER}))


def test_a_job_whose_worker_died_before_it_could_cancel_it_is_canceled(queue: Queue) -> None:
    job = queue.submit()
    queue.worker("dead", lease_s=SHORT_S).claim()
    queue.store().cancel(job)
    assert queue.reap() == {job: "canceled"}
    assert queue.state(job) is JobStatus.CANCELED


def test_a_live_lease_is_left_alone_and_one_look_takes_no_more_than_its_limit(queue: Queue) -> None:
    held = queue.submit()
    living = queue.worker("living").claim_one()
    assert living.job_id == held
    dead = queue.submit_many(3)
    queue.worker("dead", lease_s=SHORT_S).claim(mode=Mode.FAST, max_jobs=3, max_px=100 * PX)
    store = queue.store(lease_s=SHORT_S)
    first = wait_until(lambda: store.reap("janitor", quiet_s=NO_OUTAGE_S, limit=2).jobs)
    assert len(first) == 2
    second = store.reap("janitor", quiet_s=NO_OUTAGE_S, limit=2).jobs
    assert set(first) | set(second) == set(dead)
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs == {}
    assert queue.state(held) is JobStatus.PROCESSING


def _past_grace(store: JobStore) -> None:
    wait_until(lambda: store.reap("janitor", quiet_s=NO_OUTAGE_S).grace_s == 0, what="the grace period to end")


def test_nothing_expires_for_one_lease_after_the_broker_restarted(queue: Queue) -> None:
    store = queue.store(lease_s=SHORT_S)
    _past_grace(store)
    job = queue.submit()
    queue.worker(lease_s=SHORT_S).claim()
    queue.wait_ms(SHORT_S * 1000 + 1)
    queue.admin.hset(keys.REAPER, "run_id", "the broker before it restarted")
    looked = store.reap("janitor", quiet_s=NO_OUTAGE_S)
    assert looked.jobs == {}
    assert looked.grace_s == SHORT_S
    assert 0 < store.reap("janitor", quiet_s=NO_OUTAGE_S).grace_s <= SHORT_S
    assert queue.state(job) is JobStatus.PROCESSING
    assert queue.reap(store) == {job: "requeued"}


def test_a_clock_that_is_set_back_keeps_leases_from_ending_for_no_longer_than_one_lease(queue: Queue) -> None:
    """The last look was half an hour ahead, and had started a grace period."""
    store = queue.store(lease_s=SHORT_S)
    _past_grace(store)
    job = queue.submit()
    queue.worker("dead", lease_s=SHORT_S).claim()
    ahead_ms = store.now_ms() + 1_800_000
    queue.admin.hset(keys.REAPER, mapping={"at_ms": ahead_ms, "grace_ms": ahead_ms + 100})
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).grace_s <= SHORT_S
    assert queue.reap(store) == {job: "requeued"}


def test_a_clock_that_is_set_back_makes_no_lease_longer_than_ten(queue: Queue) -> None:
    store = queue.store(lease_s=SHORT_S)
    _past_grace(store)
    lost, other = queue.submit_many(2)
    dead = queue.worker("dead", lease_s=SHORT_S)
    dead.claim_one()
    queue.worker("living").claim_one()
    ahead_ms = store.now_ms() + 1_800_000
    queue.admin.zadd(keys.LEASES, {lost: ahead_ms + 100})
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs == {}
    assert queue.admin.zscore(keys.LEASES, lost) == ahead_ms + 100  # it looks at them only if the clock was set back
    queue.admin.hset(keys.REAPER, "at_ms", ahead_ms)
    store.reap("janitor", quiet_s=NO_OUTAGE_S)
    latest_ms = store.now_ms() + 10 * SHORT_S * 1000
    assert max(queue.admin.zscore(keys.LEASES, job) for job in (lost, other)) <= latest_ms
    wait_until(lambda: lost in store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs, what="the dead worker's job")


def test_nothing_expires_for_one_lease_after_nobody_looked_for_a_while(queue: Queue) -> None:
    store = queue.store(lease_s=SHORT_S)
    _past_grace(store)
    job = queue.submit()
    queue.worker(lease_s=SHORT_S).claim()
    queue.wait_ms(SHORT_S * 1000 + 1)
    looked = store.reap("another janitor", quiet_s=SHORT_S)
    assert (looked.jobs, looked.grace_s) == ({}, SHORT_S)
    assert queue.reap(store) == {job: "requeued"}


def test_a_worker_that_renews_in_the_grace_period_keeps_its_job(queue: Queue) -> None:
    store = queue.store(lease_s=SHORT_S)
    job = queue.submit()
    claim = queue.worker("cut-off", lease_s=SHORT_S).claim_one()
    queue.wait_ms(SHORT_S * 1000 + 1)
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).grace_s > 0
    assert queue.worker("cut-off").renew(claim) == ["renewed"]
    _past_grace(store)
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs == {}
    assert queue.state(job) is JobStatus.PROCESSING
