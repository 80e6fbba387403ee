"""Admission, and the totals that it counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from broker_config import keys
from broker_config.errors import (
    JobConflict,
    QueueFull,
)
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.messages import DecodeRequest, Output
from tests.support.broker_contents import assert_same, everything
from tests.support.store_queue import PX, SHORT_S, Queue
from tests.support.store_worker import StoreWorker

# Admission -----------------------------------------------------------------------------------------------------


def _refused(queue: Queue, store: JobStore, request: DecodeRequest) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        store.submit(request)
    assert caught.value.job_id == request.job_id
    assert caught.value.retry_after_s > 0
    return caught.value


def _nothing_of(queue: Queue, request: DecodeRequest) -> None:
    """A refused job left nothing but its latents, and those for ten seconds."""
    left = {key.decode() for key in queue.admin.scan_iter() if request.job_id in key.decode()}
    assert left <= {keys.blob(request.latents.name)}
    assert 0 < queue.admin.pttl(keys.blob(request.latents.name)) <= 10_000
    assert request.job_id not in queue.waiting()


def test_no_more_jobs_are_accepted_than_may_be_pending(queue: Queue) -> None:
    store = queue.store(max_pending_jobs=2)
    first, _ = queue.submit_many(2, store=store)
    refused = queue.request()
    totals = queue.totals()
    assert "2 jobs are pending" in _refused(queue, store, refused).message
    _nothing_of(queue, refused)
    assert queue.totals() == totals
    worker = queue.worker()
    assert worker.claim_one().job_id == first
    _refused(queue, store, refused)
    queue.store().cancel(queue.waiting()[0])
    assert store.submit(refused)
    assert queue.admin.ttl(keys.blob(refused.latents.name)) == -1


def test_no_more_latents_are_accepted_than_may_be_pending(queue: Queue) -> None:
    store = queue.store(max_pending_bytes=100)
    queue.submit(store=store, latents=b"x" * 60)
    refused = queue.request(latents=b"x" * 41)
    assert "100 bytes" in _refused(queue, store, refused).message
    _nothing_of(queue, refused)
    queue.submit(store=store, latents=b"x" * 40)


def test_nothing_is_accepted_that_would_fill_the_broker_to_its_watermark_once_decoded(queue: Queue) -> None:
    store = queue.store(memory_watermark=0.5)
    small = queue.request(output=Output.PNG)
    large = queue.request(height=10_000, width=10_000, output=Output.TENSOR)
    expected_bytes = 10_000 * 10_000 * 12
    used_bytes = int(queue.admin.info("memory")["used_memory"])
    with queue.max_memory(2 * (used_bytes + expected_bytes // 2)):
        assert "50%" in _refused(queue, store, large).message
        _nothing_of(queue, large)
        assert store.submit(small)
    with queue.max_memory(2 * (used_bytes + expected_bytes + 10_000_000)):
        assert store.submit(queue.request(large.job_id, height=10_000, width=10_000, output=Output.TENSOR))
        _refused(queue, store, queue.request(height=10_000, width=10_000, output=Output.TENSOR))


def test_a_refused_redecode_leaves_the_latents_of_its_source_alone(queue: Queue) -> None:
    job = queue.submit()
    before = everything(queue.admin)
    message = queue.admin.hget(keys.job(job), "message")
    request = replace(DecodeRequest.from_wire(message), job_id="again", source_job_id=job)
    _refused(queue, queue.store(max_pending_jobs=1), request)
    assert_same(before, everything(queue.admin))


def test_a_replay_is_answered_though_the_queue_is_full(queue: Queue) -> None:
    store = queue.store(max_pending_jobs=1)
    request = queue.request()
    assert store.submit(request)
    assert not store.submit(request)
    with pytest.raises(JobConflict):
        store.submit(replace(request, output=Output.WEBP))


# Totals --------------------------------------------------------------------------------------------------------


def _by_success(queue: Queue) -> JobStatus:
    worker = queue.worker()
    worker.succeed(worker.claim_one())
    return JobStatus.SUCCEEDED


def _by_error(queue: Queue) -> JobStatus:
    worker = queue.worker()
    worker.fail(worker.claim_one())
    return JobStatus.FAILED


def _by_errors(queue: Queue) -> JobStatus:
    worker = queue.worker(max_errors=2)
    worker.fail(worker.claim_one(), retryable=True)
    worker.fail(worker.claim_one(), retryable=True)
    return JobStatus.FAILED


def _by_error_of_a_cut_off_attempt(queue: Queue) -> JobStatus:
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    queue.reap()
    worker.fail(claim)
    return JobStatus.FAILED


def _by_success_of_a_cut_off_attempt(queue: Queue) -> JobStatus:
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    queue.reap()
    worker.succeed(claim)
    return JobStatus.SUCCEEDED


def _by_crash(queue: Queue) -> JobStatus:
    store = queue.store(lease_s=SHORT_S, max_crashes=1)
    worker = StoreWorker(store)
    worker.renew(worker.claim_one(), stage="device")
    queue.reap(store)
    return JobStatus.FAILED


def _by_cancel_while_queued(queue: Queue) -> JobStatus:
    queue.store().cancel(queue.waiting()[0])
    return JobStatus.CANCELED


def _by_cancel_while_running(queue: Queue) -> JobStatus:
    claim = queue.worker().claim_one()
    queue.store().cancel(claim.job_id)
    queue.store().cancel(claim.job_id, execution=claim.execution)
    return JobStatus.CANCELED


def _by_cancel_of_a_dead_workers_job(queue: Queue) -> JobStatus:
    claim = queue.worker(lease_s=SHORT_S).claim_one()
    queue.store().cancel(claim.job_id)
    queue.reap()
    return JobStatus.CANCELED


def _by_cancel_of_a_job_handed_back(queue: Queue) -> JobStatus:
    claim = queue.worker().claim_one()
    queue.store().cancel(claim.job_id)
    queue.store().release([claim])
    return JobStatus.CANCELED


def _by_deadline(queue: Queue) -> JobStatus:
    (job,) = queue.waiting()
    queue.admin.hset(keys.job(job), "deadline_ms", 1)
    assert queue.worker().claim() == []
    return JobStatus.FAILED


WAYS_TO_END: Final = [
    _by_success,
    _by_success_of_a_cut_off_attempt,
    _by_error,
    _by_errors,
    _by_error_of_a_cut_off_attempt,
    _by_crash,
    _by_cancel_while_queued,
    _by_cancel_while_running,
    _by_cancel_of_a_dead_workers_job,
    _by_cancel_of_a_job_handed_back,
    _by_deadline,
]


@pytest.mark.parametrize("end", WAYS_TO_END, ids=lambda end: end.__name__.strip("_"))
def test_what_admission_counts_is_given_back_however_a_job_ends(
    queue: Queue, end: Callable[[Queue], JobStatus]
) -> None:
    job = queue.submit(latents=b"x" * 100)
    assert queue.totals() == {"jobs": 1, "latents_bytes": 100, "reserved_bytes": 2 * PX, "px": PX}
    status = end(queue)
    assert queue.state(job) is status
    assert queue.totals() == {"jobs": 0, "latents_bytes": 0, "reserved_bytes": 0, "px": 0}
    assert queue.waiting() == []
    assert queue.admin.zcard(keys.LEASES) == 0
    assert queue.admin.zscore(keys.RETENTION, job) == queue.store().snapshot(job).expires_ms
    assert queue.admin.zcard(keys.rq_registry("wip", keys.queue_name("sd", "normal"))) == 0
    assert [key for key in queue.admin.scan_iter("rq:execution*")] == []
    assert queue.admin.xlen(keys.rq_results(job)) == 1
    queue.store().retire(job)
    assert queue.totals() == {"jobs": 0, "latents_bytes": 0, "reserved_bytes": 0, "px": 0}
    assert {key.decode() for key in queue.admin.scan_iter(f"*{job}*")} <= {keys.job(job), keys.attempts(job)}
