"""The safetensors header, read and written without torch and before anything is allocated.

Latents travel as a safetensors file with one tensor: it is self-describing, cannot run code, and is what
users already have on disk. Layout of the format (github.com/huggingface/safetensors, README "Format"):
8 bytes little-endian length N of the header · N bytes of JSON `{name: {dtype, shape, data_offsets}}` · data.
This module checks what a hostile file could get wrong: lengths, overlaps, a shape that does not fit its bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from broker_config.errors import (
    InvalidDtype,
    InvalidTensorFile,
    NotSafetensors,
    TensorFileOversized,
    TensorFileTruncated,
)

#: Name of the only tensor of a latents file that we write.
LATENTS: Final = "latents"
_ORDER: Final = "latentq.order"
#: Largest header we read. One tensor needs 100 bytes; a person's own metadata may add some kilobytes.
MAX_HEADER_BYTES: Final = 256 * 1024
MAX_RANK: Final = 8

#: safetensors' dtype names, the names numpy and torch use, and bytes per element.
_DTYPES: Final[Mapping[str, tuple[str, int]]] = {
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "U8": ("uint8", 1),
}
_CODES: Final = {name: (code, size) for code, (name, size) in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorHeader:
    """What a safetensors file says of one tensor."""

    #: Name of the tensor in the file.
    name: str
    #: float16, bfloat16, float32 or uint8.
    dtype: str
    #: Dimensions, outermost first.
    shape: tuple[int, ...]
    #: Offset of the first data byte in the file.
    data_start: int
    #: The file's own string → string metadata.
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * _CODES[self.dtype][1]

    @property
    def file_bytes(self) -> int:
        """Bytes the whole file must have."""
        return self.data_start + self.data_bytes


def itemsize(dtype: str) -> int:
    """Bytes per element of `dtype`.

    Raises:
        InvalidDtype: not one of float16, bfloat16, float32, uint8.
    """
    if dtype not in _CODES:
        raise InvalidDtype(
            f"dtype is {dtype}, expected one of float16, bfloat16, float32: convert the latents first",
            field="dtype",
        )
    return _CODES[dtype][1]


def write_header(dtype: str, shape: tuple[int, ...], metadata: Mapping[str, str] | None = None) -> bytes:
    """Everything of a one-tensor safetensors file that stands before its data."""
    itemsize(dtype)
    code, size = _CODES[dtype]
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    header[LATENTS] = {"dtype": code, "shape": list(shape), "data_offsets": [0, math.prod(shape) * size]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)  # data starts 8-byte aligned, as safetensors itself writes it
    return struct.pack("<Q", len(text)) + text


def order_metadata(order: tuple[int, ...] | None) -> dict[str, str]:
    """What a file's metadata say of its tensor's order in memory; nothing for C order."""
    return {} if order is None else {_ORDER: ",".join(str(place) for place in order)}


def memory_order(header: TensorHeader) -> tuple[int, ...] | None:
    """Dimensions of the tensor as the caller had them in memory, outermost first; None: C order.

    The file's elements are in C order all the same. Convolutions choose their kernel by strides, and kernels differ in
    last bits. Whatever is no order of these dimensions is taken for none: anybody may write metadata.
    """
    said = header.metadata.get(_ORDER, "").split(",")
    places = [str(place) for place in range(len(header.shape))]
    return tuple(int(place) for place in said) if said != places and sorted(said) == places else None


def read_header(data: bytes | bytearray | memoryview, *, total_bytes: int | None = None) -> TensorHeader:
    """The header of a file whose first bytes are `data` and whose length is `total_bytes` (default: of `data`).

    Raises:
        NotSafetensors: the bytes are no safetensors file, or hold no or several tensors.
        TensorFileTruncated: shorter than the header says.
        TensorFileOversized: longer than the header says, or a header over 256 KiB.
        InvalidDtype: a dtype other than F16, BF16, F32, U8.
    """
    total = len(data) if total_bytes is None else total_bytes
    length = header_length(data, total_bytes=total)
    if total < 8 + length or len(data) < 8 + length:
        raise TensorFileTruncated(f"the header claims {length} bytes, the file has {total}")
    header = _parse(bytes(data[8 : 8 + length]), data_start=8 + length)
    if total < header.file_bytes:
        raise TensorFileTruncated(
            f"{header.dtype} {list(header.shape)} needs {header.file_bytes} bytes, the file has {total}"
        )
    if total > header.file_bytes:
        raise TensorFileOversized(
            f"{header.dtype} {list(header.shape)} needs {header.file_bytes} bytes, the file has {total}"
        )
    return header


def header_length(data: bytes | bytearray | memoryview, *, total_bytes: int) -> int:
    """How long the header is that follows the first 8 bytes; `data` has these and may have more.

    Raises:
        NotSafetensors: the bytes are no safetensors file.
        TensorFileTruncated: fewer than 8.
        TensorFileOversized: a header over 256 KiB.
    """
    if total_bytes < 8 or len(data) < 8:
        raise TensorFileTruncated(f"the file has {total_bytes} bytes; a safetensors file starts with 8 bytes of length")
    (length,) = struct.unpack("<Q", bytes(data[:8]))
    if bytes(data[8:9]) not in (b"{", b"") or length < 2:
        raise NotSafetensors()
    if length > MAX_HEADER_BYTES:
        raise TensorFileOversized(f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
    return int(length)


def peek_header(data: bytes | bytearray) -> TensorHeader:
    """The header of a file of which only this much has come: its length and the header itself. Errors as `read_header`,
    but for those about the length of the file.
    """
    length = header_length(data, total_bytes=len(data))
    if len(data) < 8 + length:
        raise TensorFileTruncated(f"the header claims {length} bytes, {len(data)} have come")
    return _parse(bytes(data[8 : 8 + length]), data_start=8 + length)


def _parse(text: bytes, *, data_start: int) -> TensorHeader:
    try:
        header = json.loads(text.decode())  # from bytes, json.loads would take UTF-16 and UTF-32 too
    except (ValueError, RecursionError):
        raise NotSafetensors() from None
    if not isinstance(header, dict):
        raise NotSafetensors()
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise NotSafetensors("`__metadata__` of the file is not a map of strings")
    if len(header) != 1:
        names = ", ".join(map(_shown, sorted(header)[:5])) or "none"
        raise InvalidTensorFile(
            f"the file holds {len(header)} tensors ({names}); save exactly one, named `latents`",
            field="latents",
        )
    ((name, entry),) = header.items()
    shape = _shape(entry)
    code = entry.get("dtype")
    if not isinstance(code, str) or code not in _DTYPES:
        raise InvalidDtype(
            f"dtype of `{_shown(name)}` is {_shown(code)}, expected F16, BF16 or F32: convert the latents first",
            field="dtype",
        )
    dtype, size = _DTYPES[code]
    if entry.get("data_offsets") != [0, math.prod(shape) * size]:
        raise InvalidTensorFile(
            f"data_offsets {_shown(entry.get('data_offsets'))} of `{_shown(name)}` do not fit {code} {list(shape)}",
            field="latents",
        )
    return TensorHeader(name=name, dtype=dtype, shape=shape, data_start=data_start, metadata=metadata)


def _shown(value: object) -> str:
    """Something out of a file that anyone may have written, fit for a message: ASCII, one line, short."""
    return ascii(value).strip("'\"")[:80]


def _shape(entry: object) -> tuple[int, ...]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_RANK
        or not all(type(size) is int and 0 <= size < 2**40 for size in shape)
    ):
        raise NotSafetensors("the tensor's `shape` is not a list of at most 8 sizes")
    return tuple(shape)
