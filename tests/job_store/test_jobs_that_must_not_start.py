"""Claims pass by jobs that are parked, late, or better off with another worker."""

from __future__ import annotations

import pytest

from broker_config import job_store, keys
from broker_config.claims import Outcome
from broker_config.errors import (
    StartDeadlinePassed,
)
from broker_config.job_status import JobStatus
from broker_config.messages import SCHEMA_VERSION, Mode
from tests.support.store_queue import PX, Queue, ids

# Claim: jobs that must not start -------------------------------------------------------------------------------


def test_a_message_that_needs_a_newer_worker_is_parked_and_never_failed(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, job = queue.submit(schema_version=SCHEMA_VERSION + 1), queue.submit()
    worker = queue.worker()
    assert ids(worker.claim()) == [job]
    assert worker.claim() == []
    snapshot = queue.store().snapshot(newer)
    assert (snapshot.status, snapshot.error_count, snapshot.attempts) == (JobStatus.QUEUED, 0, 0)
    assert queue.admin.zscore(keys.PARKED, newer) == SCHEMA_VERSION + 1
    assert queue.store().unpark() == 0
    monkeypatch.setattr(job_store, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert queue.store().unpark() == 1
    assert queue.store().unpark() == 0
    assert ids(worker.claim()) == [newer]
    assert queue.admin.zcard(keys.PARKED) == 0


def test_parked_jobs_come_back_first_and_in_their_order(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("a", "b", "c"):
        queue.submit(job, schema_version=SCHEMA_VERSION + 1)
    assert queue.worker().claim() == []
    queue.submit("d")
    monkeypatch.setattr(job_store, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert queue.store().unpark() == 3
    assert queue.waiting() == ["a", "b", "c", "d"]


def test_a_message_that_needs_a_newer_worker_is_not_taken_along_in_a_batch(queue: Queue) -> None:
    first, newer, last = queue.submit(), queue.submit(schema_version=SCHEMA_VERSION + 1), queue.submit()
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, last]
    assert queue.waiting() == [newer]


def test_a_parked_job_can_be_canceled(queue: Queue) -> None:
    job = queue.submit(schema_version=SCHEMA_VERSION + 1)
    assert queue.worker().claim() == []
    assert queue.store().cancel(job) == "canceled"
    assert queue.admin.zcard(keys.PARKED) == 0


def test_a_parked_job_that_ends_otherwise_is_parked_no_more(queue: Queue) -> None:
    late, deleted = queue.submit_many(2, schema_version=SCHEMA_VERSION + 1, start_within_s=0.05)
    assert queue.worker().claim() == []
    assert queue.admin.zcard(keys.PARKED) == 2
    queue.admin.delete(keys.rq_job(deleted))  # with RQ's tools
    queue.admin.hset(keys.job(deleted), "queued_ms", 1)
    assert queue.store().audit([deleted], settle_s=1) == {deleted: "canceled"}
    queue.wait_ms(60)
    assert queue.store().overdue() == [late]
    assert queue.admin.zcard(keys.PARKED) == 0


def test_a_job_whose_start_deadline_passed_fails_with_its_own_code(queue: Queue) -> None:
    late, job = queue.submit(start_within_s=0.05), queue.submit()
    queue.wait_ms(60)
    assert ids(queue.worker().claim()) == [job]
    snapshot = queue.store().snapshot(late)
    assert snapshot.status is JobStatus.FAILED
    assert [error["code"] for error in snapshot.errors] == [StartDeadlinePassed.code]
    assert (snapshot.error_count, snapshot.attempts) == (1, 0)


def test_a_job_whose_start_deadline_passed_is_not_taken_along_in_a_batch(queue: Queue) -> None:
    first, late, last = queue.submit(), queue.submit(start_within_s=0.05), queue.submit()
    queue.wait_ms(60)
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, last]
    assert worker.claim() == []
    assert queue.state(late) is JobStatus.FAILED


def test_a_start_deadline_ends_a_job_that_no_worker_looks_at(queue: Queue) -> None:
    first, late, started = queue.submit(), queue.submit(start_within_s=0.05), queue.submit(start_within_s=60)
    worker = queue.worker()
    assert ids(worker.claim()) == [first]
    queue.wait_ms(60)
    assert queue.store().overdue() == [late]  # and not the one that has a minute
    snapshot = queue.store().snapshot(late)
    assert (snapshot.status, [error["code"] for error in snapshot.errors]) == (
        JobStatus.FAILED,
        [StartDeadlinePassed.code],
    )
    assert ids(worker.claim()) == [started]
    queue.admin.zadd(keys.DEADLINES, {started: 1}, xx=True)  # its minute is over while it runs
    assert queue.store().overdue() == []
    assert queue.state(started) is JobStatus.PROCESSING
    assert queue.admin.zcard(keys.DEADLINES) == 0


def test_each_vae_has_a_pixel_budget_of_its_own(queue: Queue) -> None:
    jobs = {vae: [queue.submit(vae=vae) for _ in range(3)] for vae in ("sd", "flux")}
    worker = queue.worker("worker-a", "sd", "flux")
    budget_px = {"sd": 2 * PX, "flux": 3 * PX}
    claimed = [
        ids(
            queue.store().claim(
                token=f"t{number}",
                worker=worker.name,
                vaes=worker.vaes,
                default_mode=Mode.FAST,
                max_jobs=8,
                max_px=budget_px,
            )
        )
        for number in range(3)
    ]
    assert claimed == [jobs["sd"][:2], jobs["sd"][2:], jobs["flux"]]


def test_a_job_that_ran_out_of_memory_is_tried_by_another_worker(queue: Queue) -> None:
    job, behind = queue.submit(), queue.submit()
    small, large = queue.worker("small"), queue.worker("large")
    for worker in (small, large):
        queue.store().serve(worker.name, ["sd"], ttl_s=60, report={})
    assert small.fail(small.claim_one(), retryable=True, elsewhere=True) is Outcome.RETRYING
    assert ids(small.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [behind]
    assert small.claim() == []
    assert ids(large.claim()) == [job]


def test_a_job_that_ran_out_of_memory_is_tried_again_where_nobody_else_serves(queue: Queue) -> None:
    job = queue.submit()
    small = queue.worker("small")
    queue.store().serve(small.name, ["sd"], ttl_s=60, report={})
    queue.store().serve("other", ["flux"], ttl_s=60, report={})
    queue.store().serve("gone", ["sd"], ttl_s=0.01, report={})
    small.fail(small.claim_one(), retryable=True, elsewhere=True)
    queue.wait_ms(20)
    assert ids(small.claim()) == [job]


def test_a_start_deadline_is_for_the_first_attempt_only(queue: Queue) -> None:
    job = queue.submit(start_within_s=0.2)
    worker = queue.worker()
    worker.fail(worker.claim_one(), retryable=True)
    queue.wait_ms(210)
    assert ids(worker.claim()) == [job]


def test_a_start_deadline_that_passed_while_the_job_was_only_held_counts_when_it_is_handed_back(queue: Queue) -> None:
    job = queue.submit(start_within_s=0.05)
    worker = queue.worker()
    claim = worker.claim_one()
    worker.renew(claim, stage="ready")
    queue.wait_ms(60)
    assert queue.store().overdue() == []  # a worker has it
    assert queue.store().release([claim]) == 1
    assert queue.state(job) is JobStatus.QUEUED
    assert queue.store().overdue() == [job]  # without any further claim
    assert queue.state(job) is JobStatus.FAILED


def test_a_decode_that_began_in_time_is_handed_back_without_a_start_deadline(queue: Queue) -> None:
    job = queue.submit(start_within_s=0.05)
    worker = queue.worker()
    claim = worker.claim_one()
    worker.renew(claim, stage="device")
    queue.wait_ms(60)
    queue.store().overdue()
    assert queue.store().release([claim]) == 1
    assert queue.store().overdue() == []
    assert ids(worker.claim()) == [job]


def test_any_number_of_jobs_that_must_not_start_do_not_hide_the_one_that_may(queue: Queue) -> None:
    late = queue.submit_many(250, start_within_s=0.001)
    queue.wait_ms(2)
    job = queue.submit()
    worker, store = queue.worker(), queue.store()
    while store.wait_for_work(["sd"], timeout_s=0.01):
        pass
    claims, turns = worker.claim(), 1
    while not claims:
        assert store.wait_for_work(["sd"]), "the bell calls the worker back"
        claims, turns = worker.claim(), turns + 1
    assert ids(claims) == [job]
    assert turns == 3, "a claim ends at most 100 jobs: the broker serves nobody else meanwhile"
    assert {queue.state(item) for item in late} == {JobStatus.FAILED}


@pytest.mark.parametrize(("stage", "runs"), [("ready", False), ("device", True)])
def test_a_job_that_is_handed_back_keeps_its_start_deadline_unless_its_decode_began(
    queue: Queue, stage: str, runs: bool
) -> None:
    job = queue.submit(start_within_s=0.2)
    worker = queue.worker()
    claim = worker.claim_one()
    assert worker.renew(claim, stage=stage) == ["renewed"]
    queue.store().release([claim])
    queue.wait_ms(210)
    assert ids(worker.claim()) == ([job] if runs else [])
    assert queue.state(job) is (JobStatus.PROCESSING if runs else JobStatus.FAILED)


def test_a_worker_that_passes_over_many_jobs_waits_for_the_bell(queue: Queue) -> None:
    """As many as a claim may pass over, in two queues: nothing changes by asking again at once."""
    jobs = [queue.submit(priority=priority) for priority in ("high", "normal") for _ in range(70)]
    small, store = queue.worker("small"), queue.store()
    for name in (small.name, "large"):
        store.serve(name, ["sd"], ttl_s=60, report={})
    for _ in jobs:
        small.fail(small.claim_one(), retryable=True, elsewhere=True)
    assert sorted(queue.waiting(priority="high") + queue.waiting(priority="normal")) == sorted(jobs)
    while store.wait_for_work(["sd"], timeout_s=0.01):
        pass
    assert small.claim() == []
    assert not store.wait_for_work(["sd"], timeout_s=0.05)
