"""Files that hold no usable latents are refused at the door.

What is refused for its size is refused before it is copied: those tests hand over arrays whose elements all are one
number (`broadcast_to`), and count the bytes that Python allocates meanwhile.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from broker_config.errors import (
    InvalidDtype,
    InvalidJob,
    InvalidRank,
    InvalidTensorFile,
    LatentsTooLarge,
    NotSafetensors,
    TensorFileOversized,
    TensorFileTruncated,
)
from tests.support.door import GOOD, Door, little_allocated

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
