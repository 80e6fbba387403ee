"""Claims of batches: which jobs share one."""

from __future__ import annotations

from typing import Any

import pytest

from broker_config import keys
from broker_config.job_store import CLAIM_WINDOW
from broker_config.messages import Mode, Output
from tests.support.store_queue import PX, SHORT_S, Queue, ids

# Claim: batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker_mode", "job_mode", "together"),
    [
        (Mode.EXACT, None, False),
        (Mode.FAST, None, True),
        (Mode.EXACT, Mode.FAST, True),
        (Mode.FAST, Mode.EXACT, False),
    ],
)
def test_jobs_share_a_batch_in_mode_fast_only_and_the_jobs_own_mode_counts(
    queue: Queue, worker_mode: Mode, job_mode: Mode | None, together: bool
) -> None:
    jobs = queue.submit_many(3, mode=job_mode)
    claims = queue.worker().claim(mode=worker_mode, max_jobs=8, max_px=100 * PX)
    assert ids(claims) == (jobs if together else jobs[:1])


@pytest.mark.parametrize(
    "difference",
    [
        {"height": 128, "shape": (1, 4, 16, 8)},
        {"dtype": "float16"},
        {"output": Output.TENSOR},
        {"scaling_factor": 0.5},
        {"layout": "video_2d"},
        {"mode": Mode.FAST},
    ],
    ids=lambda difference: "-".join(difference),
)
def test_a_batch_holds_jobs_of_one_bucket_and_the_others_keep_their_order(
    queue: Queue, difference: dict[str, Any]
) -> None:
    first, other, second, another = (queue.submit(**fields) for fields in ({}, difference, {}, difference))
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, second]
    assert queue.waiting() == [other, another]
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [other, another]


def test_jobs_of_one_shape_share_a_batch_whatever_picture_format_they_want(queue: Queue) -> None:
    jobs = [queue.submit(output=output) for output in (Output.PNG, Output.WEBP, Output.UINT8)]
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == jobs


@pytest.mark.parametrize(
    ("budget_px", "expected"), [(0, 1), (2 * PX - 1, 1), (2 * PX, 2), (3 * PX + 1, 3), (9 * PX, 5)]
)
def test_a_batch_stays_within_the_pixel_budget(queue: Queue, budget_px: int, expected: int) -> None:
    jobs = queue.submit_many(5)
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=budget_px)) == jobs[:expected]


def test_a_job_beyond_the_pixel_budget_still_runs_alone(queue: Queue) -> None:
    large, small = queue.submit(batch=4), queue.submit()
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=PX)) == [large]
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=PX)) == [small]


def test_a_batch_holds_no_more_jobs_than_asked_for(queue: Queue) -> None:
    jobs = queue.submit_many(5)
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=3, max_px=100 * PX)) == jobs[:3]


def test_a_batch_looks_no_further_than_the_window(queue: Queue) -> None:
    first = queue.submit()
    between = queue.submit_many(CLAIM_WINDOW - 1, dtype="float16")
    inside, beyond = queue.submit_many(2)
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, inside]
    assert queue.waiting() == [*between, beyond]


def test_a_job_that_was_on_the_device_of_a_dead_worker_runs_alone(queue: Queue) -> None:
    dies = queue.worker("dies", lease_s=SHORT_S)
    crashed = queue.submit()
    dies.renew(*dies.claim(), stage="device")
    assert queue.reap() == {crashed: "crashed"}
    others = queue.submit_many(2)
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [crashed]
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == others


def test_a_job_that_was_on_the_device_of_a_dead_worker_is_not_taken_along(queue: Queue) -> None:
    dies = queue.worker("dies", lease_s=SHORT_S)
    first, crashed, last = queue.submit_many(3)
    dies.renew(*dies.claim(token="batch", mode=Mode.FAST, max_jobs=2, max_px=100 * PX)[1:], stage="device")
    assert queue.reap() == {first: "requeued", crashed: "crashed"}
    queue_key = keys.rq_queue(keys.queue_name("sd", "normal"))
    queue.admin.delete(queue_key)
    queue.admin.rpush(queue_key, first, crashed, last)
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, last]
