"""Latents out of a body: checked as far as they can be before the bulk of it is read.

Three forms: a safetensors file, raw little-endian elements with shape and dtype beside them, and the JSON with base64
of older remote-VAE clients. Of each the shape is known first, so a picture that would be too large, a wrong layout or
a length that does not fit is refused while the rest is still on its way.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from collections.abc import Callable
from typing import Final

from broker_config.errors import (
    BadRequest,
    InvalidDtype,
    InvalidOption,
    TensorFileOversized,
    TensorFileTruncated,
)
from broker_config.tensor_header import MAX_RANK, header_length, itemsize, peek_header
from producer.gateway.uploads import Incoming, joined
from producer.tensor_input import TensorFile, check_bytes

FLOATS: Final = ("float16", "bfloat16", "float32")
#: What older clients put the latents into, and how much may be around them.
_INPUTS: Final = re.compile(rb'"inputs"\s*:\s*"')
_ENVELOPE_BYTES: Final = 1024
#: Decoded in a millisecond, during which no other thread runs; four characters are three bytes.
_BASE64_PIECE_BYTES: Final = 4 << 18
#: Says yes or raises: everything about a job that can be refused without its numbers.
Check = Callable[[TensorFile], None]


class _NotHereYet(Exception):
    """The elements were asked for before they had come."""


def refused_early(build: Callable[[TensorFile], object], tensor: TensorFile) -> None:
    """Runs `build` up to where it asks for the elements; whatever it raises before that goes through."""

    def elements() -> memoryview:
        raise _NotHereYet

    try:
        build(tensor.with_elements(elements))
    except _NotHereYet:
        return


async def read_raw(
    incoming: Incoming,
    *,
    dtype: str,
    shape: tuple[int, ...],
    length: int | None,
    max_bytes: int,
    check: Check,
    name: str = "latents",
) -> TensorFile:
    """Raw little-endian elements in C order.

    Args:
        incoming: the body, or a part of it.
        dtype: of the elements.
        shape: of the tensor.
        length: bytes that come, where known.
        max_bytes: most that one job may have.
        check: everything that can be refused already.
        name: what a message calls them.

    Raises:
        LatentsTooLarge, InvalidDtype, TensorFileTruncated, TensorFileOversized: length and shape do not fit.
        InvalidJob: what `check` raises.
    """
    expected = _checked_size(dtype, shape, max_bytes=max_bytes, name=name)
    if length is not None and length != expected:
        raise _misfit(dtype, shape, expected=expected, found=length, name=name)
    announced = _announced(dtype, shape, name=name)
    check(announced)
    pieces = await incoming.pieces(expected)
    found = sum(map(len, pieces))
    if found < expected:
        raise _misfit(dtype, shape, expected=expected, found=found, name=name)
    if not await incoming.ends():
        raise TensorFileOversized(f"{dtype} {list(shape)} has {expected} bytes, more came", field=name)
    return announced.with_elements(lambda: memoryview(joined(pieces)))


async def read_safetensors(incoming: Incoming, *, length: int | None, max_bytes: int, check: Check) -> TensorFile:
    """A safetensors file with one tensor. Arguments and errors as `read_raw`.

    Raises:
        InvalidTensorFile: not one, or its length is not what its header says.
    """
    head = await incoming.exactly(9)
    start = header_length(head, total_bytes=len(head))
    head += await incoming.exactly(8 + start - len(head))
    header = peek_header(head)
    if length is not None and length != header.file_bytes:
        raise _misfit(header.dtype, header.shape, expected=header.file_bytes, found=length)
    return await read_raw(
        incoming, dtype=header.dtype, shape=header.shape, length=None, max_bytes=max_bytes, check=check
    )


async def read_base64(
    incoming: Incoming, *, dtype: str, shape: tuple[int, ...], length: int, max_bytes: int, check: Check
) -> TensorFile:
    """`{"inputs": <base64>}`, as ComfyUI-HFRemoteVae and clients before diffusers 0.33 send it."""
    expected = _checked_size(dtype, shape, max_bytes=max_bytes)
    encoded = 4 * math.ceil(expected / 3)
    if not encoded <= length <= encoded + _ENVELOPE_BYTES:
        raise _misfit(dtype, shape, expected=encoded, found=length)
    announced = _announced(dtype, shape)
    check(announced)
    pieces = await incoming.pieces(length)
    return announced.with_elements(lambda: _decoded(memoryview(joined(pieces)), encoded=encoded, expected=expected))


def shape_of(parts: list[str]) -> tuple[int, ...]:
    """A shape as a query says it: one key for each dimension, or one with commas.

    Raises:
        InvalidOption: not 1 to 8 sizes.
    """
    texts = [item.strip() for part in parts for item in part.strip("[]() ").split(",")]
    sizes = tuple(int(item) for item in texts if item.isascii() and item.isdigit() and len(item) < 13)
    if not 1 <= len(texts) <= MAX_RANK or len(sizes) != len(texts):
        raise InvalidOption(f"shape is {','.join(parts)[:80]!r}, expected 1 to {MAX_RANK} sizes", field="shape")
    return sizes


def _decoded(body: memoryview, *, encoded: int, expected: int) -> memoryview:
    """The bytes in `{"inputs": <base64>}`. Decoded a piece at a time: one call would keep the loop waiting for all."""
    refusal = BadRequest('the body is not JSON of the form {"inputs": "<base64>"}')
    opening = _INPUTS.search(bytes(body[:_ENVELOPE_BYTES]))
    if opening is None:
        raise refusal
    start, end = opening.end(), opening.end() + encoded
    pieces = []
    try:
        around = json.loads(bytes(body[:start]) + bytes(body[end:]))
        if not isinstance(around, dict) or around.get("inputs") != "":
            raise refusal
        for at in range(start, end, _BASE64_PIECE_BYTES):
            pieces.append(binascii.a2b_base64(body[at : min(end, at + _BASE64_PIECE_BYTES)], strict_mode=True))
    except (ValueError, RecursionError):
        raise refusal from None
    data = joined(pieces)
    if len(data) != expected:
        raise refusal
    return memoryview(data)


def _announced(dtype: str, shape: tuple[int, ...], *, name: str = "latents") -> TensorFile:
    return TensorFile(dtype=dtype, shape=shape, raw=lambda: memoryview(b""), name=name)


def _checked_size(dtype: str, shape: tuple[int, ...], *, max_bytes: int, name: str = "latents") -> int:
    if dtype not in FLOATS:
        raise InvalidDtype(
            f"{name} are {dtype[:40]!r}, expected one of {', '.join(FLOATS)}: convert them first", field="dtype"
        )
    size = math.prod(shape) * itemsize(dtype)
    check_bytes(size, max_bytes=max_bytes, name=name)
    return size


def _misfit(dtype: str, shape: tuple[int, ...], *, expected: int, found: int, name: str = "latents") -> Exception:
    kind = TensorFileTruncated if found < expected else TensorFileOversized
    return kind(f"{dtype} {list(shape)} needs {expected} bytes, the body has {found}", field=name)
