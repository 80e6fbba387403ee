"""Our jobs, changed with RQ's tools."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rq import Queue
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.serializers import JSONSerializer

from broker_config import keys
from broker_config.claims import Claim, Outcome
from broker_config.job_status import JobStatus
from broker_config.messages import Mode
from tests.support.rq_side import QUEUE, Side
from tests.support.store_queue import NO_OUTAGE_S
from tests.support.wait import wait_until

# Our jobs, changed with RQ's tools -----------------------------------------------------------------------------


def test_a_queued_job_canceled_with_rqs_tools_never_runs(side: Side) -> None:
    job, other = side.submit("job"), side.submit("other")
    job.cancel()
    side.admin.lpush(keys.rq_queue(QUEUE), "job")  # as if the cancel had come between two commands of a requeue
    assert [claim.job_id for claim in side.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=1 << 30)] == ["other"]
    assert side.worker().claim() == []
    assert job.is_canceled
    assert other.get_status() == "started"


def test_a_queued_job_canceled_with_rqs_tools_is_not_taken_along_in_a_batch(side: Side) -> None:
    side.submit("first")
    job = side.submit("job")
    job.cancel()
    side.admin.rpush(keys.rq_queue(QUEUE), "job")
    assert [claim.job_id for claim in side.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=1 << 30)] == ["first"]


def test_a_queued_job_deleted_with_rqs_tools_never_runs_and_rqs_hash_stays_deleted(side: Side) -> None:
    job = side.submit("job")
    job.delete()
    side.admin.rpush(keys.rq_queue(QUEUE), "job")
    assert side.worker().claim() == []
    assert not side.admin.exists("rq:job:job")
    assert side.store.cancel("job") == "canceled"
    assert not side.admin.exists("rq:job:job")
    assert side.listed() == {}


@pytest.mark.parametrize("how", ["empty", "delete"])
def test_a_queue_emptied_with_rqs_tools_goes_on_with_the_next_job(side: Side, how: str) -> None:
    side.submit("job")
    getattr(side.queue, how)()
    assert side.worker().claim() == []
    side.submit("next")
    assert side.worker().claim_one().job_id == "next"
    assert side.rq_info()[0].startswith("queue latentq.sd.normal 0, 1 executing")


def test_a_queued_job_enqueued_again_with_rqs_tools_runs_once(side: Side) -> None:
    job = side.submit("job")
    with pytest.raises(InvalidJobOperation):
        job.requeue()
    side.queue.enqueue_job(job)
    assert side.queue.job_ids == ["job", "job"]
    worker = side.worker()
    assert worker.claim_one().job_id == "job"
    assert worker.claim() == []
    assert side.queue.job_ids == []


def test_a_failed_job_requeued_with_rqs_tools_does_not_run_again(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    worker.fail(worker.claim_one())
    side.fetch("job").requeue()
    assert side.queue.job_ids == ["job"]
    assert worker.claim() == []
    assert side.state("job") is JobStatus.FAILED


def test_a_running_job_canceled_with_rqs_tools_is_canceled_by_its_worker(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    claim = worker.claim_one()
    side.fetch("job").cancel()
    assert worker.renew(claim) == ["cancel"]
    assert side.store.cancel("job", execution=claim.execution) == "canceled"
    assert side.listed() == {"Canceled": ["job"]}


def test_a_job_canceled_with_rqs_tools_while_it_was_cut_off_is_canceled_by_its_worker(
    side: Side,
) -> None:
    side.submit("job")
    worker = side.worker()
    claim = worker.claim_one()
    side.store.reap("janitor", quiet_s=NO_OUTAGE_S)
    side.admin.hset(keys.REAPER, "grace_ms", 0)
    side.admin.zadd(keys.LEASES, {"job": 1})
    assert side.store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs == {"job": "requeued"}
    side.fetch("job").cancel()
    assert worker.renew(claim) == ["cancel"]
    assert side.store.cancel("job", execution=claim.execution) == "canceled"
    assert side.listed() == {"Canceled": ["job"]}


def _fails(side: Side, claim: Claim) -> None:
    assert side.worker().fail(claim, retryable=True) is Outcome.CANCELED


def _hands_back(side: Side, claim: Claim) -> None:
    assert side.store.release([claim]) == 0


def _dies(side: Side, claim: Claim) -> None:
    store = side.worker(lease_s=0.1).store
    assert wait_until(lambda: store.reap("janitor", quiet_s=3600).jobs) == {"job": "canceled"}


@pytest.mark.parametrize("worker_then", [_fails, _hands_back, _dies], ids=lambda then: then.__name__.strip("_"))
@pytest.mark.parametrize("how", ["canceled", "deleted"])
def test_a_running_job_ended_with_rqs_tools_does_not_go_back_into_the_queue(
    side: Side, how: str, worker_then: Callable[[Side, Claim], None]
) -> None:
    side.submit("job")
    claim = side.worker(lease_s=0.1).claim_one()
    if how == "canceled":
        side.fetch("job").cancel()
    else:
        side.fetch("job").delete()
    worker_then(side, claim)
    assert side.queue.job_ids == []
    assert side.state("job") is JobStatus.CANCELED
    assert side.listed() == ({"Canceled": ["job"]} if how == "canceled" else {})


def test_a_running_job_deleted_with_rqs_tools_still_completes_and_rqs_hash_is_not_made_again(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    claim = worker.claim_one()
    side.fetch("job").delete()
    assert worker.renew(claim, stage="device") == ["renewed"]
    assert not side.admin.exists("rq:job:job")
    assert worker.succeed(claim) is Outcome.COMPLETED
    with pytest.raises(NoSuchJobError):
        side.fetch("job")
    assert side.state("job") is JobStatus.SUCCEEDED
    assert side.listed() == {}


def test_a_running_job_canceled_with_rqs_tools_that_completes_all_the_same_is_listed_once(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    claim = worker.claim_one()
    side.fetch("job").cancel()
    assert worker.succeed(claim) is Outcome.COMPLETED
    assert side.fetch("job").is_finished
    assert side.listed() == {"Finished": ["job"]}


def test_a_stock_worker_on_our_queue_loses_nothing_and_says_what_to_do(side: Side) -> None:
    side.submit("job")
    worker = side.stock_worker("stock")
    worker.register_birth()
    found = Queue.dequeue_any([side.queue], None, connection=side.admin, serializer=JSONSerializer)
    assert found is not None
    worker.execute_job(*found)
    worker.register_death()
    result = side.fetch("job").latest_result()
    assert result is not None
    assert "latentq worker" in (result.exc_string or "")
    assert side.state("job") is JobStatus.QUEUED
    assert side.store.audit(["job"], settle_s=-1) == {"job": "requeued"}
    assert side.admin.ttl("rq:job:job") == -1
    assert side.listed() == {}
    assert side.worker().claim_one().job_id == "job"
