"""Completing, failing, canceling and handing back."""

from __future__ import annotations

import pytest

from broker_config import keys
from broker_config.claims import Outcome
from broker_config.job_status import JobStatus
from broker_config.messages import Mode
from tests.support.broker_contents import assert_same, everything
from tests.support.store_queue import PX, SHORT_S, Queue, ids

# Complete ------------------------------------------------------------------------------------------------------


def test_completing_again_says_already_and_changes_nothing(queue: Queue) -> None:
    queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    result = worker.result(claim)
    assert queue.store().complete(claim, result) is Outcome.COMPLETED
    before = everything(queue.admin)
    assert queue.store().complete(claim, result) is Outcome.ALREADY
    assert_same(before, everything(queue.admin))


def test_completing_again_says_already_after_the_client_gave_the_result_up(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    result = worker.result(claim)
    queue.store().complete(claim, result)
    queue.store().retire(job)
    before = everything(queue.admin, but={keys.blob(result.artifacts[0].blob.name)})
    assert queue.store().complete(claim, result) is Outcome.ALREADY
    assert_same(before, everything(queue.admin))


def test_a_job_whose_artifact_expired_before_it_was_complete_goes_on_until_it_is_stored_again(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    result = worker.result(claim)
    queue.admin.delete(keys.blob(result.artifacts[0].blob.name))
    before = everything(queue.admin)
    assert queue.store().complete(claim, result) is Outcome.ARTIFACT_MISSING
    assert_same(before, everything(queue.admin))
    assert queue.store().complete(claim, worker.result(claim)) is Outcome.COMPLETED
    assert queue.state(job) is JobStatus.SUCCEEDED


def test_a_cut_off_attempt_may_complete_a_job_that_waits_again(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    assert queue.reap() == {job: "requeued"}
    assert worker.succeed(claim) is Outcome.COMPLETED
    assert queue.waiting() == []
    assert queue.worker("other").claim() == []


# Fail ----------------------------------------------------------------------------------------------------------


def test_a_job_is_tried_again_until_its_errors_are_used_up_and_every_error_is_kept(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(max_errors=3)
    outcomes = [worker.fail(worker.claim_one(), retryable=True) for _ in range(3)]
    assert outcomes == [Outcome.RETRYING, Outcome.RETRYING, Outcome.FAILED]
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.error_count, snapshot.attempts) == (JobStatus.FAILED, 3, 3)
    assert [(error["code"], error["attempt"]) for error in snapshot.errors] == [
        ("decode_failed", 1),
        ("decode_failed", 2),
        ("decode_failed", 3),
    ]
    assert worker.claim() == []


def test_an_error_that_will_not_go_away_ends_the_job_at_once(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(max_errors=3)
    assert worker.fail(worker.claim_one(), retryable=False) is Outcome.FAILED
    assert queue.state(job) is JobStatus.FAILED


def test_a_job_tried_again_goes_to_the_end_of_its_queue(queue: Queue) -> None:
    first, second = queue.submit_many(2)
    worker = queue.worker()
    worker.fail(worker.claim_one(), retryable=True)
    assert queue.waiting() == [second, first]


@pytest.mark.parametrize("retryable", [True, False])
def test_failing_again_counts_once(queue: Queue, retryable: bool) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    worker.fail(claim, retryable=retryable)
    before = everything(queue.admin)
    assert worker.fail(claim, retryable=retryable) is Outcome.ALREADY
    assert_same(before, everything(queue.admin))
    assert queue.store().snapshot(job).error_count == 1


def test_a_job_that_someone_canceled_is_not_tried_again(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    assert queue.store().cancel(job) == "requested"
    assert worker.fail(claim, retryable=True) is Outcome.CANCELED
    assert queue.state(job) is JobStatus.CANCELED
    assert worker.fail(claim, retryable=True) is Outcome.ALREADY


# Cancel --------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_canceled_at_once_and_canceling_again_says_so(queue: Queue) -> None:
    job = queue.submit()
    assert queue.store().cancel(job) == "canceled"
    assert queue.waiting() == []
    before = everything(queue.admin)
    assert queue.store().cancel(job) == "canceled"
    assert_same(before, everything(queue.admin))


def test_a_running_job_is_canceled_by_its_worker(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    assert queue.store().cancel(job) == "requested"
    assert queue.store().snapshot(job).cancel_requested
    assert worker.renew(claim) == ["cancel"]
    assert queue.store().cancel(job, execution=claim.execution) == "canceled"
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.cancel_requested) == (JobStatus.CANCELED, False)
    assert worker.renew(claim) == ["lost"]
    assert queue.store().cancel(job, execution=claim.execution) == "canceled"


def test_an_ended_job_cannot_be_canceled(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    worker.succeed(worker.claim_one())
    before = everything(queue.admin)
    assert queue.store().cancel(job) == "succeeded"
    assert_same(before, everything(queue.admin))


# Release -------------------------------------------------------------------------------------------------------


def test_released_jobs_are_next_in_their_order_and_unmarked(queue: Queue) -> None:
    jobs = queue.submit_many(5)
    worker = queue.worker()
    claims = worker.claim(mode=Mode.FAST, max_jobs=3, max_px=100 * PX)
    assert queue.store().release(claims) == 3
    assert queue.waiting() == jobs
    for snapshot in queue.store().snapshots(jobs):
        assert (snapshot.attempts, snapshot.error_count, snapshot.crash_count) == (0, 0, 0)
        assert (snapshot.status, snapshot.errors) == (JobStatus.QUEUED, ())
    assert queue.admin.zcard(keys.LEASES) == 0
    assert queue.worker("other").claim_one().attempt == 1


def test_releasing_again_hands_nothing_back_that_runs_elsewhere(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claims = worker.claim()
    assert queue.store().release(claims) == 1
    before = everything(queue.admin)
    assert queue.store().release(claims) == 0
    assert_same(before, everything(queue.admin))
    assert ids(queue.worker("other").claim()) == [job]
    before = everything(queue.admin)
    assert queue.store().release(claims) == 0
    assert_same(before, everything(queue.admin))


def test_a_released_job_that_someone_canceled_is_canceled(queue: Queue) -> None:
    job = queue.submit()
    claims = queue.worker().claim()
    queue.store().cancel(job)
    assert queue.store().release(claims) == 0
    assert queue.state(job) is JobStatus.CANCELED
    assert queue.waiting() == []
