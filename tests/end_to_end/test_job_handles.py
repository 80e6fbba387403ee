"""What a job's handle does on a real worker: results and their refusals, waiting, redecode, cancel, ack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from broker_config.errors import (
    InvalidOption,
    JobCanceled,
    JobNotFinished,
    JobNotFound,
    ResultExpired,
    WaitTimeout,
    WrongOutput,
)
from producer import JobHandle, JobStatus
from tests.support.serving import PATIENCE_S, Serving
from tests.support.tiny_latents import METADATA, clip_latents, picture_latents, user_comment
from tests.support.wait import wait_until


def waiting_job(served: Serving, **options: Any) -> JobHandle:
    """A job that nobody decodes."""
    return served.client.submit(torch.zeros(1, 16, 8, 8), vae="flux", **options)


def test_each_accessor_refuses_what_the_job_did_not_make_and_names_the_right_one(served: Serving) -> None:
    picture = served.decode(picture_latents(), vae="sd", output="png")
    clip = served.decode(clip_latents(), vae="hunyuanvideo", output="mp4")
    numbers = served.decode(picture_latents(), vae="sd", output="uint8")
    wrong: list[tuple[Callable[[], object], str]] = [
        (picture.video, ".images()"),
        (picture.videos, ".images()"),
        (picture.tensor, "output='tensor'"),
        (picture.array, "output='tensor'"),
        (clip.image, ".video()"),
        (clip.images, ".video()"),
        (clip.tensor, "output='tensor'"),
        (numbers.image, ".tensor()"),
        (numbers.video, ".tensor()"),
    ]
    for accessor, right in wrong:
        with pytest.raises(WrongOutput) as refusal:
            accessor()
        assert refusal.value.code == "wrong_output"
        assert right in refusal.value.message


def test_a_result_before_the_end_is_refused_as_not_finished(served: Serving) -> None:
    job = waiting_job(served)
    for accessor in (job.result, job.artifacts, job.image, job.video, job.tensor, job.array):
        with pytest.raises(JobNotFinished, match="queued"):
            accessor()
    job.cancel()


def test_as_completed_yields_each_job_once_also_those_that_ended_before(served: Serving) -> None:
    early = [served.decode(picture_latents(), vae="sd") for _ in range(10)]
    canceled = waiting_job(served)
    canceled.cancel()
    late = [served.client.submit(picture_latents(), vae="sd") for _ in range(20)]
    seen = [job.id for job in served.client.as_completed([*early, *late, canceled, early[0]], timeout=PATIENCE_S)]
    assert sorted(seen) == sorted(job.id for job in [*early, *late, canceled])
    assert all(job.status() is JobStatus.SUCCEEDED for job in [*early, *late])


def test_as_completed_stops_at_its_timeout_and_the_rest_goes_on(served: Serving) -> None:
    done = [served.decode(picture_latents(), vae="sd") for _ in range(3)]
    waiting = waiting_job(served)
    assert {job.id for job in served.client.as_completed([waiting, *done], timeout=0.3)} == {job.id for job in done}
    assert waiting.status() is JobStatus.QUEUED
    waiting.cancel()


def test_as_completed_yields_a_job_as_soon_as_it_ends_not_in_the_order_given(served: Serving) -> None:
    waiting = waiting_job(served)
    running = served.client.submit(picture_latents(), vae="sd")
    order = served.client.as_completed([waiting, running], timeout=PATIENCE_S)
    assert next(order).id == running.id
    waiting.cancel()
    assert [job.id for job in order] == [waiting.id]


def test_as_completed_refuses_an_id_that_never_was(served: Serving) -> None:
    with pytest.raises(JobNotFound, match="never-was"):
        next(served.client.as_completed([served.client.job("never-was")]))


def test_wait_gives_up_at_its_timeout_and_the_job_goes_on(served: Serving) -> None:
    job = waiting_job(served)
    with pytest.raises(WaitTimeout, match="goes on") as refusal:
        job.wait(timeout=0.2)
    assert isinstance(refusal.value, TimeoutError)
    assert refusal.value.job_id == job.id
    assert job.status() is JobStatus.QUEUED
    job.cancel()


def test_a_job_that_no_worker_serves_says_so(served: Serving) -> None:
    waiting = waiting_job(served)
    assert not waiting.snapshot().served
    assert served.decode(picture_latents(), vae="sd").snapshot().served
    waiting.cancel()


def test_redecode_makes_another_format_of_the_same_latents(served: Serving) -> None:
    first = served.decode(picture_latents(2), vae="sd", output="png", metadata=METADATA)
    second = served.finished(first.redecode(output="uint8"))
    assert second.id != first.id
    assert np.array_equal(second.array(), np.stack([np.asarray(picture) for picture in first.images()]))
    third = served.finished(second.redecode(output="jpg"))
    assert user_comment(third.artifacts()[0][1])["metadata"] == METADATA, "what is not named stays as it was"
    request = third.snapshot().request
    assert request is not None
    assert request.source_job_id == second.id


def test_redecode_refuses_mp4_for_pictures_and_what_would_change_the_latents(served: Serving) -> None:
    job = served.decode(picture_latents(), vae="sd")
    with pytest.raises(InvalidOption, match="choose png") as refusal:
        job.redecode(output="mp4")
    assert refusal.value.field == "output"
    for name, value in {"vae": "flux", "layout": "packed", "height": 64, "width": 64, "num_frames": 1}.items():
        with pytest.raises(InvalidOption, match="belongs to the latents") as refusal:
            job.redecode(**{name: value})
        assert refusal.value.field == name


def test_redecode_outlives_the_job_whose_latents_it_shares(served: Serving) -> None:
    first = served.decode(picture_latents(), vae="sd", output="uint8")
    expected = first.array()
    second = served.finished(first.redecode(output="uint8"))
    first.ack()
    third = served.finished(second.redecode(output="uint8"))
    assert np.array_equal(second.array(), expected)
    assert np.array_equal(third.array(), expected)


def test_the_latents_of_a_canceled_job_can_be_decoded_again(served: Serving) -> None:
    job = waiting_job(served)
    job.cancel()
    again = job.redecode(output="webp")
    assert again.status() is JobStatus.QUEUED
    again.cancel()


def test_redecode_after_the_latents_are_gone_is_refused(served: Serving) -> None:
    job = served.decode(picture_latents(), vae="sd")
    job.ack()
    with pytest.raises(ResultExpired, match="submit them again"):
        job.redecode(output="webp")


def test_a_queued_job_is_canceled_at_once_and_its_result_is_refused_as_canceled(served: Serving) -> None:
    job = waiting_job(served)
    assert job.cancel() is JobStatus.CANCELED
    assert job.status() is JobStatus.CANCELED
    assert job.wait(timeout=PATIENCE_S).status is JobStatus.CANCELED
    for accessor in (job.result, job.artifacts, job.image, job.video, job.tensor, job.array):
        with pytest.raises(JobCanceled) as refusal:
            accessor()
        assert (refusal.value.code, refusal.value.job_id) == ("job_canceled", job.id)
    assert job.cancel() is JobStatus.CANCELED, "asking twice changes nothing"


def test_canceling_a_job_that_ended_leaves_its_result(served: Serving) -> None:
    job = served.decode(picture_latents(), vae="sd")
    assert job.cancel() is JobStatus.SUCCEEDED
    assert job.image().size == (96, 64)


def test_ack_frees_latents_and_artifacts_and_the_result_is_refused_as_expired(served: Serving) -> None:
    job = served.decode(picture_latents(2), vae="sd")
    assert len(served.admin.keys(f"latentq:blob:{job.id}*")) == 3, "the latents and two pictures"
    job.ack()
    assert served.admin.keys(f"latentq:blob:{job.id}*") == []
    assert job.status() is JobStatus.EXPIRED
    for accessor in (job.result, job.image):
        with pytest.raises(ResultExpired, match="submit the latents again"):
            accessor()
    job.ack()


def test_a_handle_that_saw_the_result_says_that_it_was_freed_meanwhile(served: Serving) -> None:
    job = served.client.submit(picture_latents(), vae="sd")
    assert job.wait(PATIENCE_S).status is JobStatus.SUCCEEDED
    served.client.job(job.id).ack()
    with pytest.raises(ResultExpired, match="submit the latents again"):
        job.artifacts()


def test_ack_of_a_job_that_has_not_ended_is_refused(served: Serving) -> None:
    job = waiting_job(served)
    with pytest.raises(JobNotFinished, match="cancel it instead"):
        job.ack()
    assert job.status() is JobStatus.QUEUED
    job.cancel()


def test_a_result_is_refused_as_expired_once_its_retention_ended(served: Serving) -> None:
    job = served.client.submit(picture_latents(), vae="sd", retention_s=0.3)
    wait_until(lambda: job.status() is JobStatus.EXPIRED, timeout_s=PATIENCE_S, what="the retention to end")
    for accessor in (job.result, job.artifacts, job.image):
        with pytest.raises(ResultExpired) as refusal:
            accessor()
        assert (refusal.value.code, refusal.value.job_id) == ("result_expired", job.id)
    # Nobody retired it: the broker itself dropped the bytes.
    wait_until(lambda: served.admin.keys(f"latentq:blob:{job.id}*") == [], what="the bytes to go")
