"""A caller's latents, torch or numpy, to a safetensors file in memory, checked before anything is sent.

torch is never imported here: a torch tensor brings its module along.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from broker_config.errors import InvalidDtype, InvalidOption, LatentsNotFinite, LatentsTooLarge
from broker_config.tensor_header import itemsize, read_header, write_header

if TYPE_CHECKING:
    import torch

    Latents = torch.Tensor | np.ndarray[Any, Any]
else:
    Latents = Any

_FLOATS: Final = ("float16", "bfloat16", "float32")
#: Exponent bits all set mean NaN or Inf; bfloat16 has no numpy type, so its words are looked at.
_BF16_EXPONENT: Final = 0x7F80


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """Latents as a safetensors file in memory."""

    #: The whole file.
    data: bytes
    dtype: str
    shape: tuple[int, ...]


def to_tensor_file(latents: Latents, *, max_bytes: int) -> TensorFile:
    """Latents as a file, whatever their strides or device.

    Args:
        latents: torch tensor (float16, bfloat16, float32; CPU or CUDA; any strides) or numpy array (float16, float32).
        max_bytes: largest size accepted, checked before a copy is made.

    Raises:
        InvalidOption: neither torch tensor nor numpy array.
        InvalidDtype: another dtype.
        LatentsTooLarge: more than `max_bytes`.
        LatentsNotFinite: NaN or Inf.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(latents, torch.Tensor):
        dtype = str(latents.dtype).removeprefix("torch.")
        _check(dtype, latents.numel(), max_bytes=max_bytes)
        dense = latents.detach().cpu().contiguous()
        words = dense.view(torch.uint8) if dense.ndim else dense.reshape(1).view(torch.uint8)
        raw = words.numpy().tobytes()
    elif isinstance(latents, np.ndarray):
        dtype = str(latents.dtype)
        _check(dtype, latents.size, max_bytes=max_bytes)
        raw = np.ascontiguousarray(latents).astype(latents.dtype.newbyteorder("<"), copy=False).tobytes()
    else:
        raise InvalidOption(
            f"latents are a {type(latents).__name__}: give a torch tensor or a numpy array", field="latents"
        )
    check_finite(raw, dtype)
    shape = tuple(int(size) for size in latents.shape)
    return TensorFile(data=write_header(dtype, shape) + raw, dtype=dtype, shape=shape)


def check_tensor_file(data: bytes, *, max_bytes: int) -> TensorFile:
    """A safetensors file someone else wrote, checked.

    Raises:
        LatentsTooLarge: more than `max_bytes`.
        InvalidTensorFile, InvalidDtype: not one float tensor, truncated or oversized.
        LatentsNotFinite: NaN or Inf.
    """
    if len(data) > max_bytes + 8 + 256 * 1024:
        raise LatentsTooLarge(f"the file has {len(data)} bytes, at most {max_bytes} are taken", field="latents")
    header = read_header(data)
    _check(header.dtype, header.data_bytes // itemsize(header.dtype), max_bytes=max_bytes)
    raw = data[header.data_start :]
    check_finite(raw, header.dtype)
    # Written anew: the job's bytes then depend on its numbers only, not on what else the file says.
    return TensorFile(data=write_header(header.dtype, header.shape) + raw, dtype=header.dtype, shape=header.shape)


def check_finite(raw: bytes | memoryview, dtype: str) -> None:
    """Raises `LatentsNotFinite` if the little-endian elements in `raw` have a NaN or an Inf."""
    if dtype == "bfloat16":
        words = np.frombuffer(raw, dtype="<u2")
        bad = int(np.count_nonzero((words & _BF16_EXPONENT) == _BF16_EXPONENT))
        size = words.size
    else:
        numbers = np.frombuffer(raw, dtype="<f2" if dtype == "float16" else "<f4")
        bad = int(np.count_nonzero(~np.isfinite(numbers)))
        size = numbers.size
    if bad:
        raise LatentsNotFinite(
            f"{bad} of {size} latents are NaN or Inf: the picture would be black. Check the denoiser's dtype",
            field="latents",
        )


def _check(dtype: str, count: int, *, max_bytes: int) -> None:
    if dtype not in _FLOATS:
        raise InvalidDtype(
            f"latents are {dtype}, expected one of {', '.join(_FLOATS)}: convert them first", field="latents"
        )
    size = count * itemsize(dtype)
    if size > max_bytes:
        raise LatentsTooLarge(
            f"the latents have {size} bytes, at most {max_bytes} are taken (LATENTQ_MAX_LATENTS_BYTES)",
            field="latents",
        )
