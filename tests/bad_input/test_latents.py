"""Latents of a wrong shape, dtype or size, for a VAE or layout that does not fit, are refused at the door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from broker_config.errors import (
    InvalidChannels,
    InvalidDtype,
    InvalidOption,
    InvalidRank,
    InvalidSize,
    UnknownLayout,
    UnknownVae,
)
from tests.support.door import GOOD, Door

# The VAE and the layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vae", "near"),
    [
        ("nope!!", "no name is near it"),
        ("", "no name is near it"),
        ("SD", "sd"),
        ("flux1", "flux"),
        (None, "latentq vaes"),
        (["sd"], "latentq vaes"),
        (7, "no name is near it"),
    ],
)
def test_a_vae_that_is_not_in_the_catalogue(door: Door, vae: Any, near: str) -> None:
    words = f"{vae!r} | {near} | latentq vaes | LATENTQ_CATALOG"
    with door.refuses(UnknownVae, code="unknown_vae", field="vae", words=words):
        door.client.submit(GOOD, vae=vae)


def test_no_vae_at_all(door: Door) -> None:
    with door.refuses(InvalidOption, code="invalid_option", field="vae", words="vae is missing | latentq vaes"):
        door.client.submit(GOOD)


@pytest.mark.parametrize("layout", ["packed", "sideways", "", 3, ["unpacked"]])
def test_a_layout_that_the_vae_does_not_take(door: Door, layout: Any) -> None:
    with door.refuses(UnknownLayout, code="unknown_layout", field="layout", words=f"{layout!r} | unpacked, video_2d"):
        door.client.submit(GOOD, vae="sd", layout=layout)


# The latents' shape and dtype -----------------------------------------------------------------------------


@pytest.mark.parametrize("latents", [None, "latents", [[1.0]], b"\0" * 64, object()], ids=lambda item: str(type(item)))
def test_latents_that_are_no_tensor(door: Door, latents: Any) -> None:
    words = f"{type(latents).__name__} | torch tensor or a numpy array"
    with door.refuses(InvalidOption, code="invalid_option", field="latents", words=words):
        door.client.submit(latents, vae="sd")


@pytest.mark.parametrize(
    ("shape", "vae", "options", "found", "expected"),
    [
        ((1, 3, 8, 8), "sd", {}, 3, 4),
        ((1, 8, 8, 4), "sd", {}, 8, 4),
        ((1, 16, 8, 8), "sdxl", {}, 16, 4),
        ((1, 16, 60), "flux", {"height": 64, "width": 64}, 60, 64),
        ((1, 4, 8, 8), "flux", {}, 4, 16),
        ((1, 3, 16, 8, 8), "hunyuanvideo", {}, 3, 16),
        ((1, 3, 4, 8, 8), "sd", {}, 3, 4),
    ],
)
def test_a_wrong_number_of_channels(
    door: Door, shape: tuple[int, ...], vae: str, options: dict[str, int], found: int, expected: int
) -> None:
    words = f"{found} channels | takes {expected} | choose the VAE"
    with door.refuses(InvalidChannels, code="latents_channels", field="latents", words=words):
        door.client.submit(torch.zeros(shape), vae=vae, **options)


@pytest.mark.parametrize(
    ("shape", "vae", "form"),
    [
        ((), "sd", "(batch, channels, h, w)"),
        ((4, 8, 8), "sd", "(batch, channels, h, w)"),
        ((1, 1, 4, 2, 8, 8), "sd", "(batch, channels, h, w)"),
        ((16, 64), "flux", "(batch, length, patch²*channels)"),
        ((1, 16, 8, 8), "hunyuanvideo", "(batch, channels, frames, h, w)"),
    ],
)
def test_a_wrong_number_of_dimensions(door: Door, shape: tuple[int, ...], vae: str, form: str) -> None:
    words = f"{len(shape)} dimensions | {form}"
    with door.refuses(InvalidRank, code="latents_rank", field="latents", words=words):
        door.client.submit(torch.zeros(shape), vae=vae)


@pytest.mark.parametrize("shape", [(0, 4, 8, 8), (1, 0, 8, 8), (1, 4, 0, 8), (1, 4, 8, 0), (1, 4, 0, 8, 8)])
@pytest.mark.parametrize("make", [torch.zeros, np.zeros], ids=["torch", "numpy"])
def test_an_empty_dimension(door: Door, make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    latents = make(shape) if make is torch.zeros else make(shape, "float32")
    with door.refuses(InvalidSize, code="latents_size", field="latents", words=f"{list(shape)} | empty dimension"):
        door.client.submit(latents, vae="sd")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str
)
def test_a_torch_dtype_that_is_no_latents(door: Door, dtype: torch.dtype) -> None:
    words = f"{str(dtype).removeprefix('torch.')} | float16, bfloat16, float32 | convert"
    with door.refuses(InvalidDtype, code="latents_dtype", field="latents", words=words):
        door.client.submit(torch.zeros(1, 4, 8, 8, dtype=dtype), vae="sd")


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint8", "bool", "complex64", "object", "S4", "U2", "f4,f4"])
def test_a_numpy_dtype_that_is_no_latents(door: Door, dtype: str) -> None:
    with door.refuses(
        InvalidDtype, code="latents_dtype", field="latents", words="float16, bfloat16, float32 | convert"
    ):
        door.client.submit(np.zeros((1, 4, 8, 8), dtype), vae="sd")


# Height, width and frames ---------------------------------------------------------------------------------

PACKED = torch.zeros(1, 24, 64)  # 4 × 6 patches of 16 px


@pytest.mark.parametrize(
    ("options", "field"),
    [({}, "height"), ({"width": 96}, "height"), ({"height": 64}, "width")],
)
def test_packed_latents_without_their_size(door: Door, options: dict[str, int], field: str) -> None:
    words = "do not say their size | give height and width"
    with door.refuses(InvalidSize, code="latents_size", field=field, words=words):
        door.client.submit(PACKED, vae="flux", **options)


@pytest.mark.parametrize(
    ("height", "width", "patches"),
    [(64, 64, "4 × 4 = 16"), (48, 96, "3 × 6 = 18"), (1024, 1024, "64 × 64 = 4096"), (8, 96, "0 × 6 = 0")],
)
def test_a_size_that_does_not_fit_the_packed_length(door: Door, height: int, width: int, patches: str) -> None:
    words = f"height {height} and width {width} | {patches} | have 24 | the pipeline was called with"
    with door.refuses(InvalidSize, code="latents_size", field="height", words=words):
        door.client.submit(PACKED, vae="flux", height=height, width=width)


@pytest.mark.parametrize(
    ("vae", "shape", "field", "wanted", "found"),
    [
        ("sd", (1, 4, 8, 12), "height", 72, 64),
        ("sd", (1, 4, 8, 12), "width", 64, 96),
        ("sd", (1, 4, 8, 12), "num_frames", 2, 1),
        ("flux", (1, 16, 8, 12), "height", 96, 64),
        ("hunyuanvideo", (1, 16, 3, 8, 12), "num_frames", 12, 9),
        ("hunyuanvideo", (1, 16, 3, 8, 12), "width", 64, 96),
        ("sd", (1, 4, 3, 8, 12), "num_frames", 9, 3),
    ],
)
def test_a_size_that_the_latents_do_not_decode_to(
    door: Door, vae: str, shape: tuple[int, ...], field: str, wanted: int, found: int
) -> None:
    words = f"{field} is {wanted} | decode to {found} | leave {field} out"
    with door.refuses(InvalidSize, code="latents_size", field=field, words=words):
        door.client.submit(torch.zeros(shape), vae=vae, **{field: wanted})
