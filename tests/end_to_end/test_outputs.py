"""Whatever a producer asks for, and in whatever form it has its latents: what comes back is that.

One worker process serves `sd` and `hunyuanvideo`; nobody serves `flux`, so jobs for it wait for as long as a test
likes. Pixels are compared with diffusers' own postprocessing of the job's float tensor.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image

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
from tests.support.serving import PATIENCE_S, Serving, serving
from tests.support.wait import wait_until
from worker.video_encoding import probe_video

Pixels = npt.NDArray[np.uint8]

#: First bytes of a file of each kind (PNG 5.2, JPEG B.1.1.3, RIFF container of WebP, ISO 14496-12 4.3).
SIGNATURES: dict[str, Callable[[bytes], bool]] = {
    "png": lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"),
    "jpg": lambda data: data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9"),
    "webp": lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP",
    "mp4": lambda data: data[4:8] == b"ftyp",
}
CONTENT_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "webp": "image/webp",
    "mp4": "video/mp4",
    "tensor": "application/vnd.safetensors",
    "uint8": "application/vnd.safetensors",
}
METADATA = {"prompt": "ein Kätzchen, 低品質", "seed": "42"}


@pytest.fixture(scope="module")
def served(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("outputs-broker")
    with serving(folder, catalog=tiny_catalog, vaes=("sd", "hunyuanvideo")) as started:
        yield started


def picture_latents(batch: int = 1, *, seed: int = 0) -> torch.Tensor:
    """Of `sd`: pictures of 96 × 64 px."""
    return torch.randn(batch, 4, 8, 12, generator=torch.Generator().manual_seed(seed))


def clip_latents(batch: int = 1, *, seed: int = 0) -> torch.Tensor:
    """Of `hunyuanvideo`: clips of 9 frames of 48 × 32 px."""
    return torch.randn(batch, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def waiting_job(served: Serving, **options: Any) -> JobHandle:
    """A job that nobody decodes."""
    return served.client.submit(torch.zeros(1, 16, 8, 8), vae="flux", **options)


def artifact(job: JobHandle) -> bytes:
    ((_, data),) = job.artifacts()
    return data


def psnr_db(a: Any, b: Any) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


# What each output holds -----------------------------------------------------------------------------------


def test_tensor_is_the_vaes_own_output_in_its_own_dtype(served: Serving) -> None:
    job = served.decode(picture_latents(2), vae="sd", output="tensor")
    tensor, array = job.tensor(), job.array()
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (2, 3, 64, 96))
    assert np.array_equal(array, tensor.numpy())
    assert float(tensor.min()) < 0 < float(tensor.max()), "before postprocessing: about -1 to 1"
    for number, (_, data) in enumerate(job.artifacts()):
        assert torch.equal(safetensors.torch.load(data)["latents"], tensor[number])


def test_uint8_is_what_diffusers_postprocessing_makes_of_the_tensor(served: Serving) -> None:
    tensor = served.decode(picture_latents(2), vae="sd", output="tensor").tensor()
    expected = VaeImageProcessor().postprocess(tensor, output_type="pil")
    job = served.decode(picture_latents(2), vae="sd", output="uint8")
    assert job.array().dtype == np.uint8
    assert np.array_equal(job.array(), np.stack([np.asarray(picture) for picture in expected]))
    assert torch.equal(job.tensor(), torch.from_numpy(job.array().copy()))


def test_clips_as_tensor_and_uint8_keep_their_frames(served: Serving) -> None:
    tensor = served.decode(clip_latents(2), vae="hunyuanvideo", output="tensor").tensor()
    assert tuple(tensor.shape) == (2, 3, 9, 32, 48)
    expected = VideoProcessor().postprocess_video(tensor, output_type="pil")
    array = served.decode(clip_latents(2), vae="hunyuanvideo", output="uint8").array()
    assert array.shape == (2, 9, 32, 48, 3)
    assert np.array_equal(array, np.stack([[np.asarray(frame) for frame in clip] for clip in expected]))


def test_png_is_lossless(served: Serving) -> None:
    pixels = served.decode(picture_latents(), vae="sd", output="uint8").array()[0]
    job = served.decode(picture_latents(), vae="sd", output="png")
    assert SIGNATURES["png"](artifact(job))
    assert (job.image().mode, job.image().size) == ("RGB", (96, 64))
    assert np.array_equal(np.asarray(job.image()), pixels)


@pytest.mark.parametrize("output", ["jpg", "webp"])
def test_jpg_and_webp_show_the_picture(served: Serving, output: str) -> None:
    pixels = served.decode(picture_latents(), vae="sd", output="uint8").array()[0]
    other = served.decode(picture_latents(seed=1), vae="sd", output="uint8").array()[0]
    job = served.decode(picture_latents(), vae="sd", output=output)
    assert SIGNATURES[output](artifact(job))
    assert (job.image().mode, job.image().size) == ("RGB", (96, 64))
    # Of the brightness: webp halves the resolution of colour, which random weights fill with noise.
    shown, right, wrong = (Image.fromarray(np.asarray(item)).convert("L") for item in (job.image(), pixels, other))
    assert psnr_db(shown, right) > 30 > 25 > psnr_db(wrong, right)


@pytest.mark.parametrize(("fps", "expected"), [(None, 24.0), (12, 12.0), (23.976, 23.976)])
def test_mp4_has_every_frame_at_the_rate_asked_for_or_the_vaes_own(
    served: Serving, tmp_path: Path, fps: float | None, expected: float
) -> None:
    job = served.decode(clip_latents(), vae="hunyuanvideo", output="mp4", fps=fps)
    assert SIGNATURES["mp4"](job.video())
    path = tmp_path / "clip.mp4"
    path.write_bytes(job.video())
    assert count_frames_and_secs(path) == (9, pytest.approx(9 / expected, abs=0.01))
    facts = probe_video(job.video())
    assert (facts.width, facts.height) == (48, 32)
    assert facts.fps == pytest.approx(expected, abs=0.001)


@pytest.mark.parametrize("output", CONTENT_TYPES)
def test_a_batch_of_n_gives_n_artifacts_of_the_kind_asked_for(served: Serving, output: str) -> None:
    latents, vae = (clip_latents(3), "hunyuanvideo") if output == "mp4" else (picture_latents(3), "sd")
    job = served.decode(latents, vae=vae, output=output)
    artifacts = [item for item, _ in job.artifacts()]
    assert [item.content_type for item in artifacts] == [CONTENT_TYPES[output]] * 3
    extension = "safetensors" if output in ("tensor", "uint8") else output
    assert [item.extension for item in artifacts] == [extension] * 3
    assert len({data for _, data in job.artifacts()}) == 3


def test_the_items_of_a_batch_come_back_in_order(served: Serving) -> None:
    together = served.decode(picture_latents(3), vae="sd", output="tensor").tensor()
    for item, latents in zip(together, picture_latents(3), strict=True):
        alone = served.decode(latents[None], vae="sd", output="tensor").tensor()[0]
        torch.testing.assert_close(item, alone)


def test_pictures_become_png_and_clips_mp4_unless_said_otherwise(served: Serving) -> None:
    picture = served.decode(picture_latents(), vae="sd")
    clip = served.decode(picture_latents().unsqueeze(2), vae="sd")
    assert picture.result().artifacts[0].extension == "png"
    assert clip.result().artifacts[0].extension == "mp4"


# What artifacts say about themselves ----------------------------------------------------------------------


def user_comment(data: bytes) -> dict[str, Any]:
    """The JSON in a picture's EXIF UserComment (EXIF 2.32, 4.6.5: tag 0x9286 of the IFD 0x8769, 8 bytes of charset)."""
    with Image.open(io.BytesIO(data)) as picture:
        comment = picture.getexif().get_ifd(0x8769).get(0x9286, b"")
    return dict(json.loads(comment[8:].decode("utf-16-be") or "{}"))


def png_text(data: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(data)) as picture:
        return {str(key): str(value) for key, value in picture.info.items()}


def mp4_comment(data: bytes) -> dict[str, Any]:
    """The JSON of the ©cmt box: `data` box of type 1 (UTF-8), 16 bytes of head (QuickTime File Format, metadata)."""
    at = data.find(b"\xa9cmt")
    if at < 0:
        return {}
    (size,) = struct.unpack_from(">I", data, at + 4)
    assert data[at + 8 : at + 12] == b"data"
    return dict(json.loads(data[at + 20 : at + 4 + size].decode()))


def test_metadata_arrives_in_png_text(served: Serving) -> None:
    text = png_text(artifact(served.decode(picture_latents(), vae="sd", output="png", metadata=METADATA)))
    assert {key: text[key] for key in METADATA} == METADATA


@pytest.mark.parametrize("output", ["jpg", "webp"])
def test_metadata_arrives_in_exif(served: Serving, output: str) -> None:
    job = served.decode(picture_latents(), vae="sd", output=output, metadata=METADATA)
    assert user_comment(artifact(job))["metadata"] == METADATA


def test_metadata_arrives_in_the_mp4s_comment(served: Serving) -> None:
    job = served.decode(clip_latents(), vae="hunyuanvideo", metadata=METADATA)
    assert mp4_comment(artifact(job))["metadata"] == METADATA


def provenance_of(data: bytes, output: str) -> dict[str, Any] | None:
    if output == "png":
        text = png_text(data).get("latentq")
        return None if text is None else dict(json.loads(text))
    document = mp4_comment(data) if output == "mp4" else user_comment(data)
    found = document.get("latentq")
    return None if found is None else dict(found)


def sample(output: str) -> dict[str, Any]:
    if output == "mp4":
        return {"latents": clip_latents(), "vae": "hunyuanvideo", "output": output}
    return {"latents": picture_latents(), "vae": "sd", "output": output}


@pytest.mark.parametrize("output", SIGNATURES)
def test_artifacts_say_how_they_were_made(served: Serving, output: str) -> None:
    asked = sample(output)
    job = served.decode(**asked)
    found = provenance_of(artifact(job), output)
    assert found is not None
    assert found["job_id"] == job.id
    assert (found["vae"], found["dtype"], found["device"], found["mode"]) == (asked["vae"], "float32", "cpu", "exact")
    assert found["torch"] == torch.__version__
    weights = served.client.catalog[asked["vae"]].weights
    assert found["weights"]["weights"] == weights


@pytest.mark.parametrize("output", SIGNATURES)
def test_without_provenance_equal_jobs_give_equal_bytes_that_say_nothing(served: Serving, output: str) -> None:
    first, second = (artifact(served.decode(**sample(output), provenance=False)) for _ in range(2))
    assert first == second
    assert provenance_of(first, output) is None
    assert b"latentq" not in first


# In whatever form the latents are -------------------------------------------------------------------------


def as_is(latents: torch.Tensor) -> torch.Tensor:
    return latents


def permuted(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def sliced(latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(latents, (3, 2, 1, 4))[:, :, 1:-4, 3:-2]


def every_second(latents: torch.Tensor) -> torch.Tensor:
    return latents.repeat_interleave(2, dim=3)[..., ::2]


def channels_last(latents: torch.Tensor) -> torch.Tensor:
    return latents.to(memory_format=torch.channels_last)


def expanded(latents: torch.Tensor) -> torch.Tensor:
    return latents[:1].expand(2, -1, -1, -1)


def with_gradient(latents: torch.Tensor) -> torch.Tensor:
    return latents.clone().requires_grad_()


FORMS = [as_is, permuted, sliced, every_second, channels_last, expanded, with_gradient]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: str(form.__name__))
def test_torch_latents_give_the_same_picture_whatever_their_strides(
    served: Serving, form: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    given = form(picture_latents(2).to(dtype))
    plain = given.detach().clone(memory_format=torch.contiguous_format)
    assert form in (as_is, with_gradient) or not given.is_contiguous()
    job = served.decode(given, vae="sd", output="tensor")
    assert torch.equal(job.tensor(), served.decode(plain, vae="sd", output="tensor").tensor())
    request = job.snapshot().request
    assert request is not None
    assert (request.dtype, request.shape) == (str(dtype).removeprefix("torch."), (2, 4, 8, 12))


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f4", ">f2"])
@pytest.mark.parametrize(
    "form",
    [
        np.ascontiguousarray,
        np.asfortranarray,
        lambda array: np.concatenate([array, array], axis=3)[..., 12:],
        lambda array: array[::-1, :, ::-1][::-1, :, ::-1],
        lambda array: np.broadcast_to(array[:1], array.shape),
    ],
    ids=["contiguous", "Fortran order", "sliced", "negative strides and back", "broadcast"],
)
def test_numpy_latents_give_the_same_picture_whatever_their_strides_and_byte_order(
    served: Serving, form: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], dtype: str
) -> None:
    given = form(picture_latents(2).numpy().astype(dtype))
    plain = torch.from_numpy(np.ascontiguousarray(given).astype(given.dtype.newbyteorder("=")))
    job = served.decode(given, vae="sd", output="tensor")
    assert torch.equal(job.tensor(), served.decode(plain, vae="sd", output="tensor").tensor())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_safetensors_file_gives_the_same_picture_as_its_tensor(
    served: Serving, tmp_path: Path, dtype: torch.dtype
) -> None:
    latents = picture_latents().to(dtype)
    path = tmp_path / "latents.safetensors"
    safetensors.torch.save_file({"any name": latents}, path, metadata={"made by": "someone"})
    job = served.finished(served.client.submit_file(path, vae="sd", output="tensor"))
    assert torch.equal(job.tensor(), served.decode(latents, vae="sd", output="tensor").tensor())


# Accessors ------------------------------------------------------------------------------------------------


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


# Waiting --------------------------------------------------------------------------------------------------


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


# Decoding again -------------------------------------------------------------------------------------------


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


# Ending early ---------------------------------------------------------------------------------------------


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
