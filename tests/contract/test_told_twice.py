"""What we leave in the broker is what stock RQ 3.0 leaves there, but for the differences listed here.

`broker_config/rq_format.py`, `broker_config/scripts` and `worker/rq_adapter.py` write RQ's keys without asking RQ.
Each story below is told twice on a real broker: through `JobStore`, and by a stock `SimpleWorker` with an equivalent
job.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from rq import Queue
from rq.job import Retry
from rq.serializers import JSONSerializer
from rq.worker import WorkerStatus

from broker_config.claims import Claim, Outcome
from tests.support import rq_functions
from tests.support.rq_side import RETENTION_S, Facts, Side, facts_of

# The same story, told twice ------------------------------------------------------------------------------------


@dataclass
class Story:
    """What the keys looked like at each moment."""

    side: Side
    seen: dict[str, Facts] = field(default_factory=dict)

    def look(self, moment: str) -> None:
        """Notes the keys as they are."""
        self.seen[moment] = facts_of(self.side.admin)


def _told_by_us(story: Story, end: Callable[[Side, Claim | None], None], *, claimed: bool = True) -> None:
    side = story.side
    side.submit("job")
    story.look("queued")
    with side.presence() as presence:
        claim = None
        if claimed:
            claim = side.worker().claim_one()
            presence.show(busy=True)
            story.look("running")
        end(side, claim)
        presence.show(busy=False)
        story.look("ended")


def _told_by_rq(story: Story, function: Callable[..., Any], *, stop: bool = False, **options: Any) -> None:
    side = story.side
    side.enqueue(function, "job", **options)
    story.look("queued")
    worker = side.stock_worker()
    worker.register_birth()
    worker.set_state(WorkerStatus.IDLE)

    def during(job_id: str) -> None:
        if "running" in story.seen:
            story.look("running again")
        else:
            story.look("running")
        if stop:  # what the worker does when `stop-job` reaches it
            worker._stopped_job_id = job_id

    rq_functions.during = during
    queues = [side.queue]
    while found := Queue.dequeue_any(queues, None, connection=side.admin, serializer=JSONSerializer):
        worker.execute_job(*found)
    story.look("ended")
    worker.register_death()


def _succeed(side: Side, claim: Claim | None) -> None:
    assert claim is not None
    assert side.worker().succeed(claim) is Outcome.COMPLETED


def _fail(side: Side, claim: Claim | None) -> None:
    assert claim is not None
    assert side.worker().fail(claim) is Outcome.FAILED


def _stop(side: Side, claim: Claim | None) -> None:
    assert claim is not None
    assert side.store.cancel("job", execution=claim.execution) == "canceled"


RETRY_FIELDS: Final = "retries are counted in latentq's own record"
NO_STOCK_SWEEP: Final = "no stock sweep may touch it: RQ judges by the clock of whichever host runs `rq info`"
#: Facts that hold on our side (+) or on RQ's (-) only, by moment, with the reason.
RUNNING: Final = {
    "+ rq:wip:latentq.sd.normal holds job:EXECUTION until inf": NO_STOCK_SWEEP,
    "- rq:wip:latentq.sd.normal holds job:EXECUTION until a time": NO_STOCK_SWEEP,
    "+ rq:executions:job holds EXECUTION until inf": NO_STOCK_SWEEP,
    "- rq:executions:job holds EXECUTION until a time": NO_STOCK_SWEEP,
}
WITH_RETRY: Final = {"- rq:job:job has retries_left": RETRY_FIELDS, "- rq:job:job has retry_intervals": RETRY_FIELDS}
JOBS_NOT_ATTEMPTS: Final = "we count jobs that failed, RQ counts attempts"
ONE_CANCELED: Final = "latentq has one state for what someone ended: RQ tells canceled from stopped"
WAKES_WAITERS: Final = "the entry wakes whoever waits for the job; RQ's own cancel wakes nobody"
KEPT_FOR_EVER: Final = "RQ keeps a canceled job for ever; ours goes with its retention"

SUCCESS: Final = {"running": RUNNING}
FAILURE: Final = {"running": RUNNING}
RETRIED: Final = {
    "queued": WITH_RETRY,
    "running": RUNNING | WITH_RETRY,
    "running again": RUNNING
    | WITH_RETRY
    | {
        "- rq:worker:worker-a has failed_job_count": JOBS_NOT_ATTEMPTS,
        "- rq:worker:worker-a has total_working_time": JOBS_NOT_ATTEMPTS,
    },
    "ended": WITH_RETRY | {"- rq:worker:worker-a has failed_job_count": JOBS_NOT_ATTEMPTS},
}
STOPPED: Final = {
    "running": RUNNING,
    "ended": {
        "+ rq:job:job is canceled": ONE_CANCELED,
        "- rq:job:job is stopped": ONE_CANCELED,
        "+ rq:canceled:latentq.sd.normal is a zset": ONE_CANCELED,
        "+ rq:canceled:latentq.sd.normal holds job until a time": ONE_CANCELED,
        "- rq:failed:latentq.sd.normal is a zset": ONE_CANCELED,
        "- rq:failed:latentq.sd.normal holds job until a time": ONE_CANCELED,
        "+ rq:results:job holds a STOPPED": "RQ notes a stopped job as FAILED, with a traceback of its signal",
        "- rq:results:job holds a FAILED": "as above",
        "- rq:results:job has exc_string": "as above",
        "- rq:worker:worker-a has failed_job_count": "a job that someone ended did not fail",
    },
}
CANCELED: Final = {
    "ended": {
        "+ rq:job:job is a hash that expires": KEPT_FOR_EVER,
        "- rq:job:job is a hash": KEPT_FOR_EVER,
        "+ rq:results:job is a stream that expires": WAKES_WAITERS,
        "+ rq:results:job holds a STOPPED": WAKES_WAITERS,
        "+ rq:results:job has type": WAKES_WAITERS,
        "+ rq:results:job has worker_name": WAKES_WAITERS,
    },
}


def _assert_told_alike(ours: Story, stock: Story, differences: dict[str, dict[str, str]]) -> None:
    assert ours.seen.keys() == stock.seen.keys()
    for moment, facts in ours.seen.items():
        found = {f"+ {fact}" for fact in facts - stock.seen[moment]}
        found |= {f"- {fact}" for fact in stock.seen[moment] - facts}
        assert found == set(differences.get(moment, {})), moment


def _tell_twice(
    side: Side, ours: Callable[[Story], None], stock: Callable[[Story], None], differences: dict[str, dict[str, str]]
) -> None:
    told = Story(side)
    ours(told)
    side.admin.flushall()
    again = Story(side)
    stock(again)
    _assert_told_alike(told, again, differences)


def test_a_job_that_succeeds_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    _tell_twice(
        side,
        lambda story: _told_by_us(story, _succeed),
        lambda story: _told_by_rq(story, rq_functions.succeed),
        SUCCESS,
    )


def test_a_job_that_fails_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    _tell_twice(
        side, lambda story: _told_by_us(story, _fail), lambda story: _told_by_rq(story, rq_functions.fail), FAILURE
    )


def test_a_job_that_succeeds_when_tried_again_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    def ours(story: Story) -> None:
        def end(side: Side, claim: Claim | None) -> None:
            assert claim is not None
            worker = side.worker()
            assert worker.fail(claim, retryable=True) is Outcome.RETRYING
            claim = worker.claim_one()
            story.look("running again")
            worker.succeed(claim)

        _told_by_us(story, end)

    _tell_twice(side, ours, lambda story: _told_by_rq(story, rq_functions.fail_first, retry=Retry(max=1)), RETRIED)


def test_a_job_that_is_stopped_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    _tell_twice(
        side,
        lambda story: _told_by_us(story, _stop),
        lambda story: _told_by_rq(story, rq_functions.fail, stop=True),
        STOPPED,
    )


def test_a_job_that_is_canceled_while_queued_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    def cancel(side: Side, claim: Claim | None) -> None:
        assert side.store.cancel("job") == "canceled"

    def stock(story: Story) -> None:
        job = side.enqueue(rq_functions.succeed, "job")
        story.look("queued")
        with side.presence():
            job.cancel()
            story.look("ended")
        job.delete()

    _tell_twice(side, lambda story: _told_by_us(story, cancel, claimed=False), stock, CANCELED)


def test_what_expires_does_so_when_rqs_own_would(side: Side) -> None:
    def times() -> dict[str, float]:
        now = time.time()
        return {
            "job": side.admin.pexpiretime("rq:job:job") / 1000 - now,
            "result": side.admin.pexpiretime("rq:results:job") / 1000 - now,
            "listed": side.admin.zscore("rq:finished:latentq.sd.normal", "job") - now,
        }

    _told_by_us(Story(side), _succeed)
    ours = times()
    side.admin.flushall()
    _told_by_rq(Story(side), rq_functions.succeed)
    stock = times()
    assert ours == pytest.approx(stock, abs=5)
    assert ours == pytest.approx({"job": RETENTION_S, "result": RETENTION_S, "listed": RETENTION_S}, abs=5)
