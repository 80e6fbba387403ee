"""A caller's latents, torch or numpy, to a safetensors file in memory, checked before anything is sent.

torch is never imported here: a torch tensor brings its module along.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from broker_config.errors import InvalidDtype, InvalidOption, InvalidTensorFile, LatentsNotFinite, LatentsTooLarge
from broker_config.tensor_header import MAX_HEADER_BYTES, itemsize, order_metadata, read_header, write_header

if TYPE_CHECKING:
    import torch

    Latents = torch.Tensor | np.ndarray[Any, Any]
else:
    Latents = Any

_FLOATS: Final = ("float16", "bfloat16", "float32")
#: Exponent bits all set mean NaN or Inf; bfloat16 has no numpy type, so its words are looked at.
_BF16_EXPONENT: Final = 0x7F80
#: Copied in a fraction of a millisecond.
_PIECE_BYTES: Final = 1 << 20


class TensorFile:
    """Latents as a safetensors file in memory.

    DESIGN. The file is made when `data` is first asked for: dtype and shape decide whether a job is refused, and what
    is refused must not have cost a copy, nor a transfer from the GPU.
    """

    def __init__(
        self,
        *,
        dtype: str,
        shape: tuple[int, ...],
        raw: Callable[[], memoryview],
        name: str = "latents",
        order: tuple[int, ...] | None = None,
    ) -> None:
        """Args:
        dtype: float16, bfloat16 or float32; of pictures also uint8.
        shape: dimensions, outermost first.
        raw: makes the elements, little-endian, in C order.
        name: what a message calls them: latents or pictures.
        order: dimensions as the caller has them in memory, outermost first; None: C order.
        """
        self.order = order
        self.dtype = dtype
        self.shape = shape
        self.name = name
        self._raw = raw

    def with_elements(self, raw: Callable[[], memoryview]) -> TensorFile:
        """The same of dtype and shape, with other elements."""
        return TensorFile(dtype=self.dtype, shape=self.shape, raw=raw, name=self.name)

    def in_shape(self, shape: tuple[int, ...]) -> TensorFile:
        """The same elements in another shape."""
        return TensorFile(dtype=self.dtype, shape=shape, raw=self._raw, name=self.name)

    @cached_property
    def data(self) -> bytes:
        """The whole file.

        Raises:
            LatentsNotFinite: NaN or Inf.
        """
        raw = self._raw()
        check_finite(raw, self.dtype, name=self.name)
        # A piece at a time: one copy of it all would keep every other thread, and an event loop, from running.
        file = io.BytesIO()
        file.write(write_header(self.dtype, self.shape, order_metadata(self.order)))
        for start in range(0, len(raw), _PIECE_BYTES):
            file.write(raw[start : start + _PIECE_BYTES])
        return file.getvalue()  # the buffer itself, not a copy of it


def to_tensor_file(latents: Latents, *, max_bytes: int, name: str = "latents") -> TensorFile:
    """Latents as a file, whatever their strides, byte order or device. The order of their dimensions is noted in it.

    Args:
        latents: torch tensor (float16, bfloat16, float32; CPU or CUDA; any strides) or numpy array (float16, float32).
        max_bytes: largest size accepted.
        name: what a message calls them.

    Raises:
        InvalidOption: neither torch tensor nor numpy array.
        InvalidDtype: another dtype.
        LatentsTooLarge: more than `max_bytes`.
    """
    torch = sys.modules.get("torch")
    raw: Callable[[], memoryview]
    strides: tuple[int, ...] | None
    if torch is not None and isinstance(latents, torch.Tensor):
        dtype, count = str(latents.dtype).removeprefix("torch."), latents.numel()
        strides = None if latents.is_contiguous() else latents.stride()

        def raw() -> memoryview:
            dense = latents.detach().cpu().contiguous().reshape(-1)
            words: memoryview = dense.view(torch.uint8).numpy().data
            return words

    elif isinstance(latents, np.ndarray):
        dtype, count = latents.dtype.name, latents.size
        strides = None if latents.flags.c_contiguous else latents.strides

        def raw() -> memoryview:
            dense = np.ascontiguousarray(latents, dtype=latents.dtype.newbyteorder("<")).reshape(-1)
            return dense.view(np.uint8).data

    else:
        raise InvalidOption(f"{name} are a {type(latents).__name__}: give a torch tensor or a numpy array", field=name)
    _check(dtype, count, max_bytes=max_bytes, name=name)
    order = _order_of(strides) if name == "latents" else None  # pixels are laid out anew before they are encoded
    return TensorFile(dtype=dtype, shape=tuple(int(size) for size in latents.shape), raw=raw, name=name, order=order)


def _order_of(strides: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Dimensions by their strides, the longest first; None for C order, which contiguous elements (None) have.

    What is expanded has no order that arithmetic keeps, and torch has no tensor that runs backwards.
    """
    if strides is None or min(strides) <= 0:
        return None
    order = sorted(range(len(strides)), key=lambda place: -strides[place])
    return None if order == sorted(order) else tuple(order)


def read_tensor_file(path: Path, *, max_bytes: int) -> TensorFile:
    """A safetensors file on disk, checked; one that is too large is not read. Errors as `check_tensor_file`.

    Raises:
        InvalidTensorFile: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            _check_file_size(os.fstat(file.fileno()).st_size, max_bytes=max_bytes)
            data = file.read()
    except OSError as error:
        raise InvalidTensorFile(f"{path} cannot be read: {error.strerror}", field="latents") from error
    return check_tensor_file(data, max_bytes=max_bytes)


def check_tensor_file(data: bytes, *, max_bytes: int) -> TensorFile:
    """A safetensors file someone else wrote, checked.

    Raises:
        LatentsTooLarge: more than `max_bytes`.
        InvalidTensorFile, InvalidDtype: not one float tensor, truncated or oversized.
    """
    _check_file_size(len(data), max_bytes=max_bytes)
    header = read_header(data)
    _check(header.dtype, header.data_bytes // itemsize(header.dtype), max_bytes=max_bytes)
    # Written anew: the job's bytes then depend on its numbers only, not on what else the file says.
    return TensorFile(dtype=header.dtype, shape=header.shape, raw=lambda: memoryview(data)[header.data_start :])


def check_finite(raw: bytes | memoryview, dtype: str, *, name: str = "latents") -> None:
    """Raises `LatentsNotFinite` if the little-endian elements in `raw` have a NaN or an Inf."""
    if dtype == "uint8":
        return
    if dtype == "bfloat16":
        words = np.frombuffer(raw, dtype="<u2")
        bad = int(np.count_nonzero((words & _BF16_EXPONENT) == _BF16_EXPONENT))
        size = words.size
    else:
        numbers = np.frombuffer(raw, dtype="<f2" if dtype == "float16" else "<f4")
        bad = int(np.count_nonzero(~np.isfinite(numbers)))
        size = numbers.size
    if bad:
        why = "the picture would be black. Check the denoiser's dtype" if name == "latents" else "scale them to [-1, 1]"
        raise LatentsNotFinite(f"{bad} of {size} {name} are NaN or Inf: {why}", field=name)


def _check_file_size(size_bytes: int, *, max_bytes: int) -> None:
    if size_bytes > max_bytes + 8 + MAX_HEADER_BYTES:
        raise LatentsTooLarge(
            f"the file has {size_bytes} bytes, at most {max_bytes} of latents are taken (LATENTQ_MAX_LATENTS_BYTES)",
            field="latents",
        )


def _check(dtype: str, count: int, *, max_bytes: int, name: str = "latents") -> None:
    if dtype not in _FLOATS:
        raise InvalidDtype(f"{name} are {dtype}, expected one of {', '.join(_FLOATS)}: convert them first", field=name)
    check_bytes(count * itemsize(dtype), max_bytes=max_bytes, name=name)


def check_bytes(size: int, *, max_bytes: int, name: str = "latents") -> None:
    """Raises `LatentsTooLarge` if the elements have more than `max_bytes`."""
    if size > max_bytes:
        raise LatentsTooLarge(
            f"the {name} have {size} bytes, at most {max_bytes} are taken (LATENTQ_MAX_LATENTS_BYTES)", field=name
        )
