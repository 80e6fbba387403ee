"""Renewing leases, and taking an attempt up again."""

from __future__ import annotations

import pytest

from broker_config import keys
from broker_config.claims import Outcome
from broker_config.job_status import JobStatus
from tests.support.store_queue import LONG_S, SHORT_S, Queue, ids

# Renew ---------------------------------------------------------------------------------------------------------


def test_a_renewal_moves_the_lease_and_tells_stage_and_progress(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    before = queue.admin.zscore(keys.LEASES, job)
    queue.wait_ms(5)
    assert worker.renew(claim, stage="device", done=3, total=9) == ["renewed"]
    assert queue.admin.zscore(keys.LEASES, job) > before
    snapshot = queue.store().snapshot(job)
    assert (snapshot.progress_done, snapshot.progress_total) == (3, 9)
    assert queue.admin.hget(keys.job(job), "stage") == b"device"


def test_an_attempt_never_goes_back_a_stage(queue: Queue) -> None:
    """Two threads of a worker renew; the older word may come last, and would hide that the job is on the device."""
    job = queue.submit()
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    worker.renew(claim, stage="ready")
    assert worker.renew(claim, stage="device", done=3, total=9) == ["renewed"]
    assert worker.renew(claim, stage="ready") == ["renewed"]
    assert queue.store().snapshot(job).progress_done == 3
    assert queue.reap() == {job: "crashed"}
    again = worker.claim_one()
    assert worker.renew(again, stage="ready") == ["renewed"]
    assert queue.reap() == {job: "requeued"}


def test_progress_starts_again_with_the_next_attempt(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    worker.renew(claim, done=3, total=9)
    worker.fail(claim, retryable=True)
    worker.claim_one()
    snapshot = queue.store().snapshot(job)
    assert (snapshot.progress_done, snapshot.progress_total) == (0, 0)


def test_each_renewal_gets_its_own_word(queue: Queue) -> None:
    jobs = queue.submit_many(4)
    dies, worker = queue.worker("cut-off", lease_s=SHORT_S), queue.worker()
    adopted = dies.claim_one()
    assert queue.reap() == {jobs[0]: "requeued"}
    queue.admin.lrem(keys.rq_queue(keys.queue_name("sd", "normal")), 1, jobs[0])
    renewed, canceled, lost = (worker.claim_one() for _ in range(3))
    queue.store().cancel(canceled.job_id)
    worker.succeed(lost)
    assert worker.renew(renewed, adopted, canceled, lost) == ["renewed", "adopted", "cancel", "lost"]


def test_a_job_whose_lease_ended_goes_on_if_nobody_claimed_it(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    worker.renew(claim, done=2, total=4)
    assert queue.reap() == {job: "requeued"}
    assert worker.renew(claim, done=3, total=4) == ["adopted"]
    assert queue.waiting() == []
    assert worker.renew(claim) == ["renewed"]
    assert queue.worker("other").claim() == []
    assert worker.succeed(claim) is Outcome.COMPLETED
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.attempts) == (JobStatus.SUCCEEDED, 1)


@pytest.mark.parametrize("comes_back", ["renews", "completes", "fails"])
def test_an_outage_costs_an_attempt_nothing_that_was_counted_as_a_crash(queue: Queue, comes_back: str) -> None:
    job = queue.submit()
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    worker.renew(claim, stage="device")
    assert queue.reap() == {job: "crashed"}
    assert [error["code"] for error in queue.store().snapshot(job).errors] == ["worker_crashed"]
    match comes_back:
        case "renews":
            assert worker.renew(claim, stage="device") == ["adopted"]
        case "completes":
            assert worker.succeed(claim) is Outcome.COMPLETED
        case "fails":
            assert worker.fail(claim, retryable=True) is Outcome.RETRYING
    snapshot = queue.store().snapshot(job)
    assert snapshot.crash_count == 0
    assert [error["code"] for error in snapshot.errors] == (["decode_failed"] if comes_back == "fails" else [])


def test_a_job_that_someone_else_claimed_is_not_taken_up_again(queue: Queue) -> None:
    job = queue.submit()
    cut_off = queue.worker("cut-off", lease_s=SHORT_S)
    claim = cut_off.claim_one()
    assert queue.reap() == {job: "requeued"}
    assert ids(queue.worker("other").claim()) == [job]
    assert cut_off.renew(claim) == ["lost"]
    assert queue.store().snapshot(job).worker == "other"


def test_a_word_about_the_stage_alone_leaves_a_lease_that_has_half_of_its_time(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    before = queue.admin.zscore(keys.LEASES, job)
    queue.wait_ms(5)
    assert worker.renew(claim, stage="device", extend=False) == ["renewed"]
    assert queue.admin.hget(keys.job(job), "stage") == b"device"
    assert queue.admin.zscore(keys.LEASES, job) == before
    queue.admin.zadd(keys.LEASES, {job: before - LONG_S * 1000 / 2})  # half of the time went by
    assert worker.renew(claim, stage="encode", extend=False) == ["renewed"]
    assert queue.admin.zscore(keys.LEASES, job) > before


def test_a_word_about_the_stage_alone_takes_a_job_up_again_and_hears_of_a_cancel(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    assert queue.reap() == {job: "requeued"}
    assert worker.renew(claim, extend=False) == ["adopted"]
    assert queue.admin.zscore(keys.LEASES, job) is not None
    queue.store().cancel(job)
    assert worker.renew(claim, extend=False) == ["cancel"]
