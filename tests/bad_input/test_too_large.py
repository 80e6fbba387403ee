"""Latents with NaN or Inf, and those that are too large, are refused at the door.

What is refused for its size is refused before it is copied: those tests hand over arrays whose elements all are one
number (`broadcast_to`), and count the bytes that Python allocates meanwhile.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.numpy
import safetensors.torch
import torch

from broker_config.errors import (
    InvalidOption,
    LatentsNotFinite,
    LatentsTooLarge,
    PixelLimitExceeded,
)
from broker_config.latent_geometry import Geometry
from producer.decode_options import DecodeOptions
from producer.option_checks import check_result_size, checked_options
from tests.support.door import Door, claimed, little_allocated

# NaN and Inf ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_number_that_is_not_finite(door: Door, dtype: torch.dtype, value: float) -> None:
    latents = torch.zeros(1, 4, 8, 8, dtype=dtype)
    latents[0, 3, 7, 5] = value
    words = "1 of 256 latents | NaN or Inf | black | denoiser's dtype"
    with door.refuses(LatentsNotFinite, code="latents_not_finite", field="latents", words=words):
        door.client.submit(latents, vae="sd")
    if dtype is not torch.bfloat16:  # numpy has none
        with door.refuses(LatentsNotFinite, code="latents_not_finite", field="latents", words=words):
            door.client.submit(latents.numpy(), vae="sd")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_file_with_a_number_that_is_not_finite(door: Door, tmp_path: Path, dtype: str) -> None:
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    path = tmp_path / "latents.safetensors"
    safetensors.torch.save_file({"latents": torch.full((1, 4, 8, 8), float("nan"), dtype=torch_dtype)}, path)
    words = "256 of 256 latents | NaN or Inf"
    with door.refuses(LatentsNotFinite, code="latents_not_finite", field="latents", words=words):
        door.client.submit_file(path, vae="sd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_and_smallest_finite_numbers_are_taken(door: Door, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    numbers = [limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -0.0]
    latents = torch.tensor(numbers * 64, dtype=torch.float64)[:256].to(dtype).reshape(1, 4, 8, 8)
    assert door.client.submit(latents, vae="sd").cancel() == "canceled"


# Too large ------------------------------------------------------------------------------------------------


def test_a_picture_above_the_pixel_limit_is_refused_before_anything_is_copied(door: Door) -> None:
    words = "8000 × 8008 = 64064000 px | 64000000 | LATENTQ_MAX_IMAGE_PX"
    with (
        little_allocated(),
        door.refuses(PixelLimitExceeded, code="pixel_limit_exceeded", field="latents", words=words),
    ):
        door.client.submit(claimed(1, 4, 1001, 1000), vae="sd")


@pytest.mark.parametrize(
    ("shape", "vae", "pixels"),
    [
        ((1, 16, 783, 100, 100), "hunyuanvideo", "1 × 3129 frames of 800 × 800 = 2002560000 px"),
        ((1, 4, 32, 1000, 1000), "sd", "1 × 32 frames of 8000 × 8000 = 2048000000 px"),
        ((32, 4, 1000, 1000), "sd", "32 × 1 frames of 8000 × 8000 = 2048000000 px"),
    ],
    ids=["clip of a video VAE", "clip of an image VAE", "batch of pictures"],
)
def test_a_job_above_the_pixel_limit_is_refused_before_anything_is_copied(
    door: Door, shape: tuple[int, ...], vae: str, pixels: str
) -> None:
    words = f"{pixels} | 2000000000 | LATENTQ_MAX_CLIP_PX"
    with (
        little_allocated(),
        door.refuses(PixelLimitExceeded, code="pixel_limit_exceeded", field="latents", words=words),
    ):
        door.client.submit(claimed(*shape), vae=vae)


def test_packed_latents_above_the_pixel_limit_are_refused_before_anything_is_copied(door: Door) -> None:
    words = "8000 × 8016 = 64128000 px | LATENTQ_MAX_IMAGE_PX"
    with (
        little_allocated(),
        door.refuses(PixelLimitExceeded, code="pixel_limit_exceeded", field="latents", words=words),
    ):
        door.client.submit(claimed(1, 501 * 500, 64), vae="flux", height=8016, width=8000)


def test_torch_latents_above_the_pixel_limit_are_refused_before_anything_is_copied(door: Door) -> None:
    latents = torch.zeros((), dtype=torch.float16).expand(1, 4, 1001, 1000)
    words = "64064000 px | LATENTQ_MAX_IMAGE_PX"
    with (
        little_allocated(),
        door.refuses(PixelLimitExceeded, code="pixel_limit_exceeded", field="latents", words=words),
    ):
        door.client.submit(latents, vae="sd")


@pytest.mark.parametrize("tensor", ["numpy", "torch"])
def test_latents_of_too_many_bytes_are_refused_before_anything_is_copied(door: Door, tensor: str) -> None:
    shape = (1, 4, 8, 2**21 + 1)  # 4 · 8 · (2²¹ + 1) · 4 bytes = 256 MiB + 128
    latents = claimed(*shape, dtype="float32") if tensor == "numpy" else torch.zeros(()).expand(shape)
    words = "268435584 bytes | 268435456 | LATENTQ_MAX_LATENTS_BYTES"
    with (
        little_allocated(),
        door.refuses(LatentsTooLarge, code="latents_too_large", field="latents", words=words),
    ):
        door.client.submit(latents, vae="sd")


def test_bad_options_are_refused_before_anything_is_copied(door: Door) -> None:
    with (
        little_allocated(),
        door.refuses(InvalidOption, code="invalid_option", field="output", words="gif"),
    ):
        door.client.submit(claimed(1, 4, 1000, 1000), vae="sd", output="gif")


def test_numbers_that_the_broker_cannot_hold_in_one_value_are_refused_before_they_are_made(door: Door) -> None:
    """129 frames of 720p: 357 MB as uint8, 713 MB or more as the VAE's own numbers; Redis ends at 512 MiB."""
    latents = torch.zeros(1, 16, 33, 90, 160, dtype=torch.float16)
    words = "at least 713318400 bytes | 536870912 | mp4 | LATENTQ_BLOB_STORE"
    with door.refuses(InvalidOption, code="invalid_option", field="output", words=words):
        door.client.submit(latents, vae="hunyuanvideo", output="tensor")
    for output in ("uint8", "mp4"):
        assert door.client.submit(latents, vae="hunyuanvideo", output=output).cancel() == "canceled"


def test_pictures_to_encode_may_be_many_since_their_latents_are_few(door: Door) -> None:
    geometry = Geometry(batch=1, num_frames=121, height=720, width=1280, is_video=True)
    entry, settings = door.client.catalog["hunyuanvideo"], door.client.settings
    checked = checked_options(
        DecodeOptions(vae="hunyuanvideo", output="tensor"), entry=entry, geometry=geometry, settings=settings
    )
    assert checked["output"] == "tensor"
    with pytest.raises(InvalidOption, match="LATENTQ_BLOB_STORE"):
        check_result_size(checked["output"], geometry, entry, settings)
