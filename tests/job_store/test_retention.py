"""Retention, and how long blobs live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from broker_config import keys
from broker_config.claims import Claim, Outcome
from broker_config.errors import BlobMissing, JobConflict
from broker_config.job_list import JobList
from broker_config.job_status import JobStatus
from broker_config.messages import DecodeRequest
from tests.support.broker_contents import assert_same, everything
from tests.support.store_queue import Queue, end, names
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

# Retention and ownership ---------------------------------------------------------------------------------------


def _again(queue: Queue, source: str, **fields: Any) -> str:
    """Redecodes a job: a new job on the same blob."""
    message = queue.admin.hget(keys.job(source), "message")
    request = replace(DecodeRequest.from_wire(message), job_id=f"again-{next(names)}", source_job_id=source, **fields)
    assert queue.store().submit(request)
    return request.job_id


def test_latents_and_artifacts_stay_as_long_as_the_job_says_after_its_end(queue: Queue) -> None:
    job = queue.submit(retention_s=100.0)
    latents = keys.blob(f"{job}.in")
    assert queue.admin.ttl(latents) == -1
    end(queue, job)
    ends_ms = queue.store().snapshot(job).expires_ms
    result = queue.store().snapshot(job).result
    assert result is not None
    for key in (latents, keys.blob(result.artifacts[0].blob.name), keys.rq_job(job), keys.rq_results(job)):
        assert abs(queue.admin.pexpiretime(key) - ends_ms) <= 5, key
    tombstone_ms = round(queue.settings.tombstone_s * 1000)
    assert abs(queue.admin.pexpiretime(keys.job(job)) - ends_ms - tombstone_ms) <= 5
    assert ends_ms - queue.store().snapshot(job).ended_ms == 100_000


def test_a_blob_lives_while_a_redecoded_job_needs_it_though_the_first_job_is_gone(queue: Queue) -> None:
    first = queue.submit(latents=b"precious")
    blob = keys.blob(f"{first}.in")
    end(queue, first)
    assert queue.admin.ttl(blob) > 0
    second = _again(queue, first)
    assert queue.admin.ttl(blob) == -1
    queue.store().retire(first)
    assert queue.state(first) is JobStatus.EXPIRED
    assert queue.admin.get(blob) == b"precious"
    assert queue.admin.ttl(blob) == -1
    end(queue, second)
    assert queue.admin.ttl(blob) > 0
    queue.store().retire(second)
    assert not queue.admin.exists(blob, keys.owners(f"{first}.in"))


@pytest.mark.parametrize(("first_s", "second_s"), [(50.0, 5000.0), (5000.0, 50.0)])
def test_a_blob_lives_exactly_as_long_as_its_last_owner_needs_it(queue: Queue, first_s: float, second_s: float) -> None:
    first = queue.submit(retention_s=first_s)
    second = _again(queue, first, retention_s=second_s)
    for job in (first, second):
        end(queue, job)
    snapshots = queue.store().snapshots([first, second])
    blob = keys.blob(f"{first}.in")
    assert abs(queue.admin.pexpiretime(blob) - max(item.expires_ms for item in snapshots)) <= 5
    longest, shortest = sorted((first, second), key=lambda job: queue.store().snapshot(job).expires_ms, reverse=True)
    queue.store().retire(longest)
    left = queue.store().snapshot(shortest).expires_ms
    assert abs(queue.admin.pexpiretime(blob) - left) <= 5
    queue.store().retire(shortest)
    assert not queue.admin.exists(blob)


def test_what_is_due_is_retired_and_only_a_tombstone_is_left(queue: Queue) -> None:
    due, kept = queue.submit(retention_s=0.05), queue.submit()
    for job in (due, kept):
        end(queue, job)
    assert wait_until(queue.store().retire) == 1
    snapshot = queue.store().snapshot(due)
    assert (snapshot.status, snapshot.request, snapshot.result) == (JobStatus.EXPIRED, None, None)
    assert queue.admin.hget(keys.job(due), "outcome") == b"succeeded"
    assert 0 < queue.admin.ttl(keys.job(due)) <= queue.settings.tombstone_s
    left = {key.decode() for key in queue.admin.scan_iter() if due in key.decode()}
    assert left == {keys.job(due)}
    for kind in ("finished", "failed", "canceled"):
        assert queue.admin.zscore(keys.rq_registry(kind, keys.queue_name("sd", "normal")), due) is None
    assert queue.state(kept) is JobStatus.SUCCEEDED


def _succeed(worker: StoreWorker, claim: Claim) -> None:
    worker.succeed(claim)


def _fail(worker: StoreWorker, claim: Claim) -> None:
    worker.fail(claim)


def _cancel_on_the_device(worker: StoreWorker, claim: Claim) -> None:
    worker.renew(claim, stage="device", done=3, total=9)
    worker.store.cancel(claim.job_id)
    worker.store.cancel(claim.job_id, execution=claim.execution)


@pytest.mark.parametrize("how", [_succeed, _fail, _cancel_on_the_device])
def test_a_tombstone_says_all_that_was_said_but_for_request_and_result(
    queue: Queue, how: Callable[[StoreWorker, Claim], None]
) -> None:
    request = queue.request(metadata={"prompt": "a word " * 100})
    queue.store().submit(request)
    worker = queue.worker("worker-of-a-host-with-a-name-3141592-a1b2c3")
    claim = worker.claim_one()
    how(worker, claim)
    told, (row,) = queue.store().snapshot(claim.job_id), JobList(queue.connections).rows([claim.job_id])
    assert queue.store().retire(claim.job_id) == 1
    assert queue.store().snapshot(claim.job_id) == replace(told, status=JobStatus.EXPIRED, request=None, result=None)
    (left,) = JobList(queue.connections).rows([claim.job_id])
    assert left == replace(row, status=JobStatus.EXPIRED, request=None, age_s=left.age_s)
    assert queue.store().admit(request, in_broker=True) is False
    with pytest.raises(JobConflict):
        queue.store().admit(replace(request, height=128), in_broker=True)


def test_a_late_word_of_a_finished_attempt_is_known_by_the_tombstone(queue: Queue) -> None:
    queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    assert worker.succeed(claim) is Outcome.COMPLETED
    queue.store().retire(claim.job_id)
    assert worker.succeed(claim) is Outcome.ALREADY


def test_a_tombstone_takes_a_few_hundred_bytes(queue: Queue) -> None:
    """It stays for a week, of each job: as a hash table it would be three times as large."""
    # as the gateway has ids, of a key and of a client's own UUID
    job = queue.submit("k_0a1b2c3d_01a20705-75e0-7516-994f-73b28fe13df0", metadata={"prompt": "a word " * 100})
    end(queue, job)
    queue.store().retire(job)
    assert queue.admin.object("encoding", keys.job(job)) == b"listpack"
    assert queue.admin.memory_usage(keys.job(job)) < 640


def test_a_job_past_its_retention_says_expired_before_anyone_came_by(queue: Queue) -> None:
    job = queue.submit(retention_s=0.05)
    end(queue, job)
    queue.wait_ms(60)
    assert queue.state(job) is JobStatus.EXPIRED
    with pytest.raises(BlobMissing):
        _again(queue, job)


def test_retiring_again_changes_nothing(queue: Queue) -> None:
    job = queue.submit()
    end(queue, job)
    assert queue.store().retire(job) == 1
    before = everything(queue.admin)
    assert queue.store().retire(job) == 0
    assert_same(before, everything(queue.admin))


@pytest.mark.parametrize("running", [False, True])
def test_a_live_job_cannot_be_retired(queue: Queue, running: bool) -> None:
    job = queue.submit()
    if running:
        queue.worker().claim()
    before = everything(queue.admin)
    assert queue.store().retire(job) == 0
    assert_same(before, everything(queue.admin))
