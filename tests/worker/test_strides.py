"""Latents keep the order that they had in the caller's memory: a VAE's convolutions choose their kernels by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from producer.tensor_input import to_tensor_file
from worker.latent_io import read_latents


def arrived(latents: torch.Tensor | npt.NDArray[Any]) -> torch.Tensor:
    file = to_tensor_file(latents, max_bytes=1 << 20)
    return read_latents(file.data, shape=file.shape, dtype=file.dtype)


@pytest.mark.parametrize(
    "latents",
    [
        torch.randn(2, 4, 6, 8).to(memory_format=torch.channels_last),
        torch.randn(1, 4, 6, 8).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 16, 6, 8).permute(0, 2, 1, 3, 4),
        torch.randn(2, 3, 6, 8, 16, dtype=torch.bfloat16).permute(0, 4, 1, 2, 3),
    ],
    ids=["channels last", "one picture", "frames first", "a clip with channels last"],
)
def test_strides_arrive(latents: torch.Tensor) -> None:
    assert not latents.is_contiguous()
    made = arrived(latents)
    assert made.stride() == latents.stride()
    assert torch.equal(made, latents)


@pytest.mark.parametrize(
    "latents",
    [torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 10)[..., 1:9], torch.randn(1, 4, 6, 8).expand(2, -1, -1, -1)],
    ids=["contiguous", "a part of more", "expanded"],
)
def test_what_has_no_order_of_its_own_arrives_in_c_order(latents: torch.Tensor) -> None:
    made = arrived(latents)
    assert made.is_contiguous()
    assert torch.equal(made, latents)


#: Elements in the order of memory.
NUMBERS = np.arange(2 * 4 * 6 * 8, dtype=np.float32)


@pytest.mark.parametrize(
    "latents",
    [
        NUMBERS.reshape(2, 4, 6, 8, order="F"),
        NUMBERS.reshape(2, 6, 8, 4).transpose(0, 3, 1, 2),
        NUMBERS.astype(np.float16).reshape(4, 2, 6, 8).swapaxes(0, 1),
        NUMBERS.astype(">f4").reshape(2, 6, 8, 4).transpose(0, 3, 1, 2),
    ],
    ids=["Fortran order", "channels last", "a transposed view", "big-endian"],
)
def test_strides_of_an_array_arrive(latents: npt.NDArray[Any]) -> None:
    made = arrived(latents)
    assert not made.is_contiguous()
    assert made.stride() == tuple(stride // latents.itemsize for stride in latents.strides)
    assert np.array_equal(made.numpy(), latents)


@pytest.mark.parametrize(
    "latents",
    [
        NUMBERS.reshape(2, 4, 6, 8),
        NUMBERS.reshape(2, 4, 6, 8)[..., 1:7],
        NUMBERS.reshape(2, 4, 6, 8)[:, ::-1],
        np.broadcast_to(NUMBERS.reshape(2, 4, 6, 8)[:1], (2, 4, 6, 8)),
    ],
    ids=["contiguous", "a part of more", "backwards", "expanded"],
)
def test_an_array_that_has_no_order_of_its_own_arrives_in_c_order(latents: npt.NDArray[Any]) -> None:
    made = arrived(latents)
    assert made.is_contiguous()
    assert np.array_equal(made.numpy(), latents)


def test_pixels_are_sent_in_c_order() -> None:
    pixels = NUMBERS.reshape(2, 4, 6, 8, order="F")
    assert b"latentq.order" in to_tensor_file(pixels, max_bytes=1 << 20).data
    assert b"latentq.order" not in to_tensor_file(pixels, max_bytes=1 << 20, name="pictures").data
