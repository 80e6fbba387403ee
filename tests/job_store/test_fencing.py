"""What an attempt says too late changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from broker_config import keys
from broker_config.claims import Claim, Outcome
from broker_config.decode_result import DecodeResult
from broker_config.errors import (
    JobNotFound,
)
from tests.support.broker_contents import assert_same, everything
from tests.support.store_queue import SHORT_S, Queue, ids
from tests.support.store_worker import StoreWorker

# Fencing -------------------------------------------------------------------------------------------------------


def _reclaimed(queue: Queue, claim: Claim) -> None:
    assert ids(queue.worker("other").claim()) == [claim.job_id]


def _done_by_other(queue: Queue, claim: Claim) -> None:
    other = queue.worker("other")
    other.succeed(other.claim_one())


def _failed_by_other(queue: Queue, claim: Claim) -> None:
    other = queue.worker("other")
    other.fail(other.claim_one())


def _canceled_meanwhile(queue: Queue, claim: Claim) -> None:
    queue.store().cancel(claim.job_id)


def _tombstone(queue: Queue, claim: Claim) -> None:
    _done_by_other(queue, claim)
    queue.store().retire(claim.job_id)


def _handed_back(queue: Queue, claim: Claim) -> None:
    other = queue.worker("other")
    queue.store().release(other.claim())


def _tombstone_gone(queue: Queue, claim: Claim) -> None:
    _tombstone(queue, claim)
    queue.admin.delete(keys.job(claim.job_id), keys.attempts(claim.job_id))


def _say(word: str, worker: StoreWorker, claim: Claim, result: DecodeResult) -> object:
    match word:
        case "complete":
            return worker.store.complete(claim, result)
        case "fail":
            return worker.fail(claim, retryable=True)
        case "fail for good":
            return worker.fail(claim, retryable=False)
        case "renew":
            return worker.renew(claim, stage="device", done=1, total=2)
        case "release":
            return worker.store.release([claim])
        case _:
            try:
                return worker.store.cancel(claim.job_id, execution=claim.execution)
            except JobNotFound:
                return JobNotFound


#: What happened since the attempt was cut off, and what its cancel is answered then.
MEANWHILE: Final[dict[Callable[[Queue, Claim], None], object]] = {
    _reclaimed: "lost",
    _done_by_other: "succeeded",
    _failed_by_other: "failed",
    _canceled_meanwhile: "canceled",
    _handed_back: "lost",
    _tombstone: "expired",
    _tombstone_gone: JobNotFound,
}
TOO_LATE: Final = {
    "complete": Outcome.LOST,
    "fail": Outcome.LOST,
    "fail for good": Outcome.LOST,
    "renew": ["lost"],
    "release": 0,
}


@pytest.mark.parametrize("word", [*TOO_LATE, "cancel"])
@pytest.mark.parametrize("meanwhile", MEANWHILE, ids=lambda given: given.__name__.strip("_"))
def test_what_an_attempt_says_too_late_changes_nothing(
    queue: Queue, meanwhile: Callable[[Queue, Claim], None], word: str
) -> None:
    job = queue.submit()
    late = queue.worker("late", lease_s=SHORT_S)
    claim = late.claim_one()
    result = late.result(claim)  # stored, but nobody will own it
    assert queue.reap() == {job: "requeued"}
    meanwhile(queue, claim)
    before = everything(queue.admin)
    assert _say(word, late, claim, result) == TOO_LATE.get(word, MEANWHILE[meanwhile])
    assert_same(before, everything(queue.admin))


def test_a_word_about_a_job_that_never_was_makes_no_key(queue: Queue) -> None:
    claim = Claim(job_id="never", execution="t", message=b"", rq_data=b"", attempt=1, crashes=0)
    worker = queue.worker()
    result = worker.result(claim)
    before = everything(queue.admin)
    assert queue.store().complete(claim, result) is Outcome.LOST
    assert worker.fail(claim, retryable=True) is Outcome.LOST
    assert worker.renew(claim) == ["lost"]
    assert queue.store().release([claim]) == 0
    assert queue.store().retire("never") == 0
    with pytest.raises(JobNotFound):
        queue.store().cancel("never")
    with pytest.raises(JobNotFound):
        queue.store().snapshot("never")
    assert_same(before, everything(queue.admin))
