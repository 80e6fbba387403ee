"""Jobs on our queues that someone enqueued with RQ itself."""

from __future__ import annotations

import time

import pytest
from rq.registry import (
    FailedJobRegistry,
)
from rq.results import Result

from broker_config import keys
from broker_config.job_status import JobStatus
from broker_config.messages import DECODE_FUNCTION, Mode
from tests.support import rq_functions
from tests.support.broker_contents import assert_same, everything
from tests.support.rq_side import DAY_S, QUEUE, Side

# Jobs that are not ours ----------------------------------------------------------------------------------------


def _foreign_failed(side: Side, job_id: str) -> None:
    job = side.fetch(job_id)
    result = job.latest_result()
    assert result is not None
    assert result.type is Result.Type.FAILED
    assert result.exc_string is not None
    assert "enqueued with RQ itself" in result.exc_string
    assert "producer.DecodeClient" in result.exc_string
    assert job.get_status() == "failed"
    assert job.ended_at is not None
    assert job_id in side.registry(FailedJobRegistry).get_job_ids()
    assert rq_functions.called == []


def test_a_job_enqueued_with_rq_itself_fails_with_a_clear_error_and_is_never_called(side: Side) -> None:
    side.enqueue(rq_functions.succeed, "foreign")
    side.submit("ours")
    assert side.worker().claim_one().job_id == "ours"
    _foreign_failed(side, "foreign")
    assert side.queue.job_ids == []
    assert side.state("ours") is JobStatus.PROCESSING


def test_a_function_named_as_ours_is_no_job_of_ours_without_a_record(side: Side) -> None:
    side.queue.enqueue_call(DECODE_FUNCTION, args=["foreign"], job_id="foreign")
    assert side.worker().claim() == []
    _foreign_failed(side, "foreign")


@pytest.mark.parametrize(("own_ttl", "expected_s"), [(None, 7 * DAY_S), (100, 100), (-1, 7 * DAY_S)])
def test_a_job_that_is_not_ours_is_listed_as_long_as_it_asks_for_and_never_for_ever(
    side: Side, own_ttl: int | None, expected_s: int
) -> None:
    side.enqueue(rq_functions.succeed, "foreign", failure_ttl=own_ttl)
    assert side.worker().claim() == []
    for key in ("rq:job:foreign", "rq:results:foreign"):
        assert expected_s - 5 <= side.admin.ttl(key) <= expected_s
    listed_s = side.admin.zscore(f"rq:failed:{QUEUE}", "foreign") - time.time()
    assert listed_s == pytest.approx(expected_s, abs=5)


def test_a_job_that_is_not_ours_and_is_listed_twice_fails_once(side: Side) -> None:
    side.enqueue(rq_functions.succeed, "foreign")
    side.admin.rpush(keys.rq_queue(QUEUE), "foreign")
    assert side.worker().claim() == []
    assert side.queue.job_ids == []
    assert side.admin.xlen("rq:results:foreign") == 1


def test_a_job_that_is_not_ours_may_be_requeued_and_fails_again(side: Side) -> None:
    side.enqueue(rq_functions.succeed, "foreign")
    side.worker().claim()
    side.fetch("foreign").requeue()
    assert side.queue.job_ids == ["foreign"]
    assert side.worker().claim() == []
    _foreign_failed(side, "foreign")


@pytest.mark.parametrize("how", ["canceled", "deleted"])
def test_a_job_that_is_not_ours_and_was_ended_with_rqs_tools_leaves_no_trace_of_us(side: Side, how: str) -> None:
    job = side.enqueue(rq_functions.succeed, "foreign")
    if how == "canceled":
        job.cancel()
    else:
        job.delete()
    side.admin.rpush(keys.rq_queue(QUEUE), "foreign")
    untouched = {keys.rq_queue(QUEUE), "latentq:claim:worker-a"}  # what a worker last claimed: nothing
    before = everything(side.admin, but=untouched)
    assert side.worker().claim() == []
    assert_same(before, everything(side.admin, but=untouched))
    if how == "canceled":
        job.delete()


def test_a_job_that_is_not_ours_is_not_taken_along_in_a_batch(side: Side) -> None:
    side.submit("first")
    side.enqueue(rq_functions.succeed, "foreign")
    side.submit("last")
    claims = side.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=1 << 30)
    assert [claim.job_id for claim in claims] == ["first", "last"]
    assert side.worker().claim() == []
    _foreign_failed(side, "foreign")
