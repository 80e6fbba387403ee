"""Whatever a producer asks for, and in whatever form it has its latents: what comes back is that.

One worker process serves `sd` and `hunyuanvideo`; nobody serves `flux`, so jobs for it wait for as long as a test
likes. Pixels are compared with diffusers' own postprocessing of the job's float tensor.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
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

from producer import JobHandle
from tests.support.serving import Serving
from tests.support.tiny_latents import METADATA, clip_latents, picture_latents, user_comment
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


def artifact(job: JobHandle) -> bytes:
    ((_, data),) = job.artifacts()
    return data


def psnr_db(a: Any, b: Any) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


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
    made, expected = job.tensor(), served.decode(plain, vae="sd", output="tensor").tensor()
    if form in (permuted, channels_last):  # strides choose the convolutions' kernels: tests/parity has their last bits
        assert torch.allclose(made, expected, atol=1e-5)
    else:
        assert torch.equal(made, expected)
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
