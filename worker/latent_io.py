"""Stored latents to torch tensors, and decoded tensors to safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch

from broker_config.errors import InvalidTensorFile, LatentsNotFinite
from broker_config.tensor_header import memory_order, read_header, write_header

_TORCH: Final[Mapping[str, torch.dtype]] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "uint8": torch.uint8,
}
_NAMES: Final = {dtype: name for name, dtype in _TORCH.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name used in messages and the catalogue."""
    return _TORCH[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name messages use for a torch dtype."""
    return _NAMES[dtype]


def read_latents(data: bytes, *, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Latents of a stored file, on the CPU, sharing no memory with `data`, with the strides that the caller's had.

    Args:
        data: safetensors file with one tensor.
        shape: shape the job's message promises.
        dtype: dtype the job's message promises.

    Raises:
        InvalidTensorFile: the file holds something else than the message promises.
        LatentsNotFinite: NaN or Inf.
    """
    header = read_header(data)
    if header.shape != shape or header.dtype != dtype:
        raise InvalidTensorFile(
            f"the stored latents are {header.dtype} {list(header.shape)}, the job says {dtype} {list(shape)}"
        )
    flat = torch.frombuffer(bytearray(memoryview(data)[header.data_start :]), dtype=_TORCH[dtype])
    latents = flat.reshape(shape)
    if not bool(torch.isfinite(latents).all()):
        raise LatentsNotFinite(field="latents")
    order = memory_order(header)
    if order is not None:
        latents = latents.permute(order).contiguous().permute([order.index(place) for place in range(len(order))])
    return latents


def write_tensor(tensor: torch.Tensor) -> bytes:
    """A safetensors file that holds `tensor` (float16, bfloat16, float32 or uint8; any strides) as `latents`."""
    dense = tensor.detach().cpu().contiguous()
    return write_header(_NAMES[dense.dtype], tuple(dense.shape)) + dense.view(torch.uint8).numpy().tobytes()


def to_frames(pixels: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 pixels as numpy, without a copy when they are on the CPU already."""
    array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = pixels.cpu().contiguous().numpy()
    return array
