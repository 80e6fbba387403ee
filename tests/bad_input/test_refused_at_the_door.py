"""Bad input is refused at the door: by a stable code, naming the field and the fix, and nothing is left in the broker.

What is refused for its size is refused before it is copied: those tests hand over arrays whose elements all lie on one
number (`broadcast_to`), and count the bytes that Python allocates meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
import socket
import struct
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import redis
import safetensors.numpy
import safetensors.torch
import torch

from broker_config.connection import Connections
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import (
    BrokerNotRunning,
    BrokerUnreachable,
    ConfigurationError,
    InvalidChannels,
    InvalidDtype,
    InvalidJob,
    InvalidOption,
    InvalidRank,
    InvalidSize,
    InvalidTensorFile,
    LatentqError,
    LatentsNotFinite,
    LatentsTooLarge,
    NotSafetensors,
    PixelLimitExceeded,
    TensorFileOversized,
    TensorFileTruncated,
    UnknownLayout,
    UnknownVae,
)
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient, Settings
from worker.image_encoding import encode_image

#: What a refusal may allocate: messages and a header, never latents.
LITTLE_BYTES = 1 << 20
GOOD = torch.zeros(1, 4, 8, 8)


@dataclass(frozen=True)
class Door:
    """A client, and a look at what it left in the broker."""

    client: DecodeClient
    admin: redis.Redis

    @contextlib.contextmanager
    def refuses(self, kind: type[LatentqError], *, code: str, field: str | None, words: str) -> Iterator[None]:
        """The block must raise `kind` itself, whose message has each of `words`, and leave no key behind."""
        with pytest.raises(kind) as refusal:
            yield
        error = refusal.value
        assert type(error) is kind
        assert (error.code, error.field) == (code, field)
        assert [word for word in words.split(" | ") if word not in error.message] == []
        assert "\n" not in error.message
        if isinstance(error, InvalidJob):
            assert isinstance(error, ValueError)
            assert not error.retryable
        assert self.admin.keys("*") == []


@pytest.fixture
def door(client: DecodeClient, broker_url: str) -> Iterator[Door]:
    with redis.Redis.from_url(broker_url) as admin:
        yield Door(client, admin)


@pytest.fixture
def make_door(door: Door, connections: Connections, settings: Settings) -> Callable[..., Door]:
    """Another client of the same broker, with other limits."""

    def make(**limits: object) -> Door:
        changed = settings.model_copy(update=limits)
        return Door(DecodeClient(connections, settings=changed, catalog=VaeCatalog.load(changed.catalog)), door.admin)

    return make


@contextlib.contextmanager
def little_allocated() -> Iterator[None]:
    """Fails if the block had more than a little allocated at any moment (numpy's arrays and bytes count)."""
    tracemalloc.start()
    try:
        yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < LITTLE_BYTES


def claimed(*shape: int, dtype: str = "float16") -> npt.NDArray[Any]:
    """An array of this shape that holds one number."""
    return np.broadcast_to(np.zeros((), dtype), shape)


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


# Files ----------------------------------------------------------------------------------------------------


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    """Any header, as the format has it: 8 bytes of length, JSON, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], *, dtype: str = "F32", data_bytes: int | None = None) -> dict[str, Any]:
    size = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1}[dtype]
    size_bytes = math.prod(shape) * size if data_bytes is None else data_bytes
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size_bytes]}


WHOLE = safetensors.torch.save({"latents": GOOD})
TWO = safetensors.numpy.save({"a": np.zeros(4, "float32"), "b": np.zeros(4, "float32")})


@pytest.mark.parametrize(
    ("content", "kind", "code", "field", "words"),
    [
        (b"", TensorFileTruncated, "tensor_file_truncated", None, "0 bytes"),
        (WHOLE[:7], TensorFileTruncated, "tensor_file_truncated", None, "7 bytes"),
        (WHOLE[:20], TensorFileTruncated, "tensor_file_truncated", None, "the file has 20"),
        (WHOLE[:-1], TensorFileTruncated, "tensor_file_truncated", None, f"the file has {len(WHOLE) - 1}"),
        (WHOLE + b"\0", TensorFileOversized, "tensor_file_oversized", None, f"the file has {len(WHOLE) + 1}"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), NotSafetensors, "tensor_file_not_safetensors", None, "safetensors"),
        (b"PK\x03\x04" + bytes(64), NotSafetensors, "tensor_file_not_safetensors", None, "save_file"),
        (pickle.dumps({"latents": [0.0] * 64}), NotSafetensors, "tensor_file_not_safetensors", None, "save_file"),
        (b"not a tensor at all", NotSafetensors, "tensor_file_not_safetensors", None, "save_file"),
        (safetensors_file(b"{oh no"), NotSafetensors, "tensor_file_not_safetensors", None, "save_file"),
        (TWO, InvalidTensorFile, "tensor_file_invalid", "latents", "2 tensors (a, b) | exactly one"),
        (safetensors_file({}), InvalidTensorFile, "tensor_file_invalid", "latents", "0 tensors | exactly one"),
        (
            safetensors_file(b"{" + b" " * 2**18 + b"}"),
            TensorFileOversized,
            "tensor_file_oversized",
            None,
            f"{2**18 + 2} bytes | 262144",
        ),
        (
            struct.pack("<Q", 2**63) + b"{}",
            TensorFileOversized,
            "tensor_file_oversized",
            None,
            f"claims {2**63} bytes",
        ),
        (
            safetensors_file({"latents": entry([1, 4, 8, 8], dtype="F64")}, bytes(2048)),
            InvalidDtype,
            "latents_dtype",
            "dtype",
            "F64 | F16, BF16 or F32 | convert",
        ),
        (
            safetensors_file({"latents": entry([1, 4, 8, 8], dtype="U8")}, bytes(256)),
            InvalidDtype,
            "latents_dtype",
            "latents",
            "uint8 | convert",
        ),
        (
            safetensors_file({"latents": entry([1, 4, 8, 8], data_bytes=2048)}, bytes(2048)),
            InvalidTensorFile,
            "tensor_file_invalid",
            "latents",
            "data_offsets | do not fit F32 [1, 4, 8, 8]",
        ),
        (
            safetensors_file({"latents": entry([4, 8, 8])}, bytes(1024)),
            InvalidRank,
            "latents_rank",
            "latents",
            "3 dimensions",
        ),
    ],
    ids=[
        "empty",
        "shorter than the length",
        "header cut off",
        "data cut off",
        "a byte too long",
        "a PNG",
        "a torch.save",
        "a pickle",
        "text",
        "a header that is no JSON",
        "two tensors",
        "no tensor",
        "a header of 256 KiB",
        "a header that claims 8 EiB",
        "float64",
        "uint8",
        "offsets that do not fit the shape",
        "a wrong rank",
    ],
)
def test_a_file_that_holds_no_usable_latents(
    door: Door, tmp_path: Path, content: bytes, kind: type[InvalidJob], code: str, field: str | None, words: str
) -> None:
    path = tmp_path / "latents.safetensors"
    path.write_bytes(content)
    with door.refuses(kind, code=code, field=field, words=words):
        door.client.submit_file(path, vae="sd")


@pytest.mark.parametrize("shape", [[1, 4, 2**20, 2**20], [2**39, 2**39, 2**39, 2**39], [1, 4, 8, 2**40 - 1]])
def test_a_header_that_claims_a_huge_tensor_is_refused_from_the_header_alone(
    door: Door, tmp_path: Path, shape: list[int]
) -> None:
    path = tmp_path / "latents.safetensors"
    head = safetensors_file({"latents": entry(shape)})
    path.write_bytes(head + bytes(64))
    words = f"needs {len(head) + math.prod(shape) * 4} bytes | the file has {len(head) + 64}"
    with (
        little_allocated(),
        door.refuses(TensorFileTruncated, code="tensor_file_truncated", field=None, words=words),
    ):
        door.client.submit_file(path, vae="sd")


def test_a_file_above_the_size_limit_is_refused_before_it_is_read(
    make_door: Callable[..., Door], tmp_path: Path
) -> None:
    path = tmp_path / "latents.safetensors"
    with path.open("wb") as file:
        file.truncate(64 << 20)  # a hole: it takes no space on the disk
    door = make_door(max_latents_bytes=1 << 20)
    words = f"{64 << 20} bytes | {1 << 20} | LATENTQ_MAX_LATENTS_BYTES"
    with little_allocated(), door.refuses(LatentsTooLarge, code="latents_too_large", field="latents", words=words):
        door.client.submit_file(path, vae="sd")


def test_latents_in_a_file_above_the_size_limit(make_door: Callable[..., Door], tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    path.write_bytes(WHOLE)  # 1024 bytes of data
    door = make_door(max_latents_bytes=1023)
    words = "1024 bytes | 1023 | LATENTQ_MAX_LATENTS_BYTES"
    with door.refuses(LatentsTooLarge, code="latents_too_large", field="latents", words=words):
        door.client.submit_file(path, vae="sd")


def test_a_file_that_is_not_there_or_no_file(door: Door, tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "missing.safetensors", "No such file"), (tmp_path, "directory")):
        words = f"{path} cannot be read | {reason}"
        with door.refuses(InvalidTensorFile, code="tensor_file_invalid", field="latents", words=words):
            door.client.submit_file(path, vae="sd")


# Options --------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")

BAD_OPTIONS: Mapping[str, list[Any]] = {
    "height": [0, -64, 64.0, "64", True, NAN],
    "width": [0, -64, 64.0, "64", True, NAN],
    "num_frames": [0, -1, 1.0, "1", False],
    "fps": [0, -8, 240.5, 0.0001, NAN, INF, "24", True],
    "output": ["gif", "PNG", "", 3],
    "mode": ["quick", "", True],
    "priority": ["urgent", "", None, 0],
    "timeout_s": [0, -1, NAN, INF, "60", True, 31_536_001],
    "start_within_s": [0, -1, NAN, INF, "60", True, 31_536_001],
    "retention_s": [0, -1, NAN, INF, "60", True, 31_536_001],
    "scaling_factor": [0, 0.0, NAN, INF, "0.5", True],
    "shift_factor": [NAN, INF, "0.5", True],
    "provenance": ["no", 0, None],
    "allow_tiling": ["no", 0, None],
    "job_id": ["", "a b", "a:b", "../a", "ä", "a\n", "a" * 65, 7, b"a"],
}
#: What the message says of each: what would be right, or what to do.
FIXES = {
    "height": "whole number above 0",
    "width": "whole number above 0",
    "num_frames": "whole number above 0",
    "fps": "from 0.001 to 240",
    "output": "png, jpg, webp, mp4, tensor, uint8",
    "mode": "exact, fast",
    "priority": "high, normal, low",
    "timeout_s": "seconds above 0, at most a year",
    "start_within_s": "seconds above 0, at most a year",
    "retention_s": "seconds above 0, at most a year",
    "scaling_factor": "finite number",
    "shift_factor": "finite number",
    "provenance": "True or False",
    "allow_tiling": "True or False",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in BAD_OPTIONS.items() for value in bad])
def test_a_bad_value_of_an_option(door: Door, name: str, value: Any) -> None:
    with door.refuses(InvalidOption, code="invalid_option", field=name, words=f"{name} | {FIXES.get(name, 'job_id')}"):
        door.client.submit(GOOD, vae="sd", **{name: value})


@pytest.mark.parametrize("name", ["ouput", "Output", "colour", "metdata", "webhok", "output "])
def test_an_option_that_does_not_exist_or_is_misspelt(door: Door, name: str) -> None:
    words = f"{name} is not an option | metadata, | output, | priority, | width"
    options: dict[str, Any] = {name: "png"}
    with door.refuses(InvalidOption, code="invalid_option", field=name, words=words):
        door.client.submit(GOOD, vae="sd", **options)


def test_mp4_of_pictures(door: Door) -> None:
    words = "needs a clip | choose png"
    with door.refuses(InvalidOption, code="invalid_option", field="output", words=words):
        door.client.submit(GOOD, vae="sd", output="mp4")


@pytest.mark.parametrize(
    ("output", "shape", "words"),
    [
        ("jpg", (1, 4, 1, 8188), "65500 px a side | 65504 × 8 | choose png"),
        ("jpg", (1, 4, 8188, 1), "65500 px a side | 8 × 65504 | choose png"),
        ("webp", (1, 4, 1, 2048), "16383 px a side | 16384 × 8 | choose png"),
        ("webp", (1, 4, 2048, 1), "16383 px a side | 8 × 16384 | choose png"),
        ("mp4", (1, 4, 2, 1, 2049), "16384 px a side | 16392 × 8 | choose uint8"),
        ("mp4", (1, 4, 2, 2049, 1), "16384 px a side | 8 × 16392 | choose uint8"),
    ],
)
def test_a_side_that_the_format_cannot_hold(door: Door, output: str, shape: tuple[int, ...], words: str) -> None:
    with door.refuses(InvalidOption, code="invalid_option", field="output", words=words):
        door.client.submit(torch.zeros(shape), vae="sd", output=output)


@pytest.mark.parametrize(
    ("output", "shape"),
    [("jpg", (1, 4, 1, 8187)), ("webp", (1, 4, 1, 2047)), ("mp4", (1, 4, 2, 1, 2048)), ("png", (1, 4, 1, 8188))],
)
def test_the_longest_side_that_the_format_holds_is_taken(door: Door, output: str, shape: tuple[int, ...]) -> None:
    assert door.client.submit(torch.zeros(shape), vae="sd", output=output).cancel() == "canceled"


# Metadata and ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("prompt", "not a map"),
        ([("prompt", "a cat")], "not a map"),
        ({"seed": 42}, "metadata['seed'] is not a string | convert"),
        ({"seed": None}, "metadata['seed'] is not a string | convert"),
        ({42: "seed"}, "metadata[42] is not a string | convert"),
        ({b"seed": "42"}, "metadata[b'seed'] is not a string | convert"),
        ({"": "x"}, "1 to 79 printable latin-1 characters"),
        ({"k" * 80: "x"}, "1 to 79 printable latin-1 characters"),
        ({"a\0b": "x"}, "1 to 79 printable latin-1 characters"),
        ({"a\nb": "x"}, "1 to 79 printable latin-1 characters"),
        ({" seed": "x"}, "without outer or double spaces"),
        ({"seed ": "x"}, "without outer or double spaces"),
        ({"the  seed": "x"}, "without outer or double spaces"),
        ({"提示": "x"}, "1 to 79 printable latin-1 characters"),
        ({"\ud800": "x"}, "1 to 79 printable latin-1 characters"),
        ({"latentq": "x"}, "'latentq' is taken | rename"),
        ({"prompt": "a\0b"}, "metadata['prompt'] | NUL | remove"),
        ({"prompt": "a\ud800b"}, "metadata['prompt'] | lone surrogate | remove"),
        ({"prompt": "\udfff"}, "metadata['prompt'] | lone surrogate | remove"),
        ({"prompt": "x" * 16_384}, "16398 bytes | 16384 | LATENTQ_MAX_METADATA_BYTES"),
    ],
    ids=lambda item: ascii(item)[:40],
)
def test_metadata_that_no_file_could_hold(door: Door, metadata: Any, words: str) -> None:
    with door.refuses(InvalidOption, code="invalid_option", field="metadata", words=words):
        door.client.submit(GOOD, vae="sd", metadata=metadata)


def test_more_metadata_than_a_jpg_holds(make_door: Callable[..., Door]) -> None:
    door = make_door(max_metadata_bytes=1 << 20)
    metadata = {"prompt": "x" * 31_000}  # 62,028 bytes in UTF-16, of the 65,533 that a JPEG segment holds
    with door.refuses(InvalidOption, code="invalid_option", field="metadata", words="jpg | UTF-16 | choose png"):
        door.client.submit(GOOD, vae="sd", output="jpg", metadata=metadata)
    assert door.client.submit(GOOD, vae="sd", output="png", metadata=metadata).cancel() == "canceled"


def test_a_jpg_holds_all_the_metadata_that_the_door_lets_through(make_door: Callable[..., Door]) -> None:
    metadata = {"prompt": "x" * ((61_000 - 2 * len('{"prompt": ""}')) // 2)}
    door = make_door(max_metadata_bytes=1 << 20)
    assert door.client.submit(GOOD, vae="sd", output="jpg", metadata=metadata).cancel() == "canceled"
    provenance = {"job_id": "j" * 64, "weights": {"weights": "/" + "w" * 1_000, "sha256": "0" * 64}, "more": "m" * 700}
    pixels = np.zeros((8, 8, 3), np.uint8)
    assert encode_image(pixels, output="jpg", metadata=metadata, provenance=provenance).extension == "jpg"


def test_a_bad_id_for_a_job_that_is_decoded_again(door: Door) -> None:
    job = door.client.submit(GOOD, vae="sd")
    before = sorted(door.admin.keys("*"))
    with pytest.raises(InvalidOption, match="A-Z a-z 0-9 _ -") as refusal:
        job.redecode(job_id="a:b")
    assert (refusal.value.code, refusal.value.field) == ("invalid_option", "job_id")
    assert sorted(door.admin.keys("*")) == before
    job.cancel()


# The broker -----------------------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def said(error: BaseException) -> str:
    """Everything a log would show of an error."""
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize("form", ["redis://me:s3cret@{host}/0", "redis://:s3cret@{host}/0?client_name=s3cret"])
def test_a_broker_that_does_not_answer(closed_port: int, form: str) -> None:
    with (
        DecodeClient.from_url(form.format(host=f"127.0.0.1:{closed_port}")) as client,
        pytest.raises(BrokerUnreachable) as refusal,
    ):
        client.submit(torch.zeros(1, 16, 8, 8), vae="flux", job_id="mine")
    error = refusal.value
    assert (error.code, error.retryable, error.job_id) == ("broker_unreachable", True, "mine")
    assert f"redis://127.0.0.1:{closed_port}/0 " in error.message
    assert "latentq up" in error.message
    assert "LATENTQ_REDIS_URL" in error.message
    assert "\n" not in error.message
    assert "s3cret" not in said(error)


def test_a_broker_that_refuses_the_login(broker_server: EmbeddedBroker) -> None:
    url = broker_server.url.replace("unix://", "unix://me:s3cret@")
    with DecodeClient.from_url(url) as client, pytest.raises(BrokerUnreachable) as refusal:
        client.ping()
    assert "user and password" in refusal.value.message
    assert "s3cret" not in said(refusal.value)


@pytest.mark.parametrize("url", ["http://me:s3cret@localhost/0", "localhost:6379", "redis://me:s3cret@localhost:x/0"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        DecodeClient.from_url(url)
    assert refusal.value.code == "configuration_invalid"
    assert "redis://host:6379/0" in refusal.value.message
    assert "s3cret" not in said(refusal.value)


def test_no_broker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BrokerNotRunning) as refusal:
        DecodeClient.from_env(data_dir=tmp_path / "data")
    assert (refusal.value.code, refusal.value.retryable) == ("broker_not_running", True)
    assert "latentq up" in refusal.value.message
    assert "LATENTQ_REDIS_URL" in refusal.value.message
    assert not (tmp_path / "data").exists(), "looking for a broker makes no folder"
