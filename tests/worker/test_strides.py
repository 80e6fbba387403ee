"""Latents keep the order that they had in the caller's memory: a VAE's convolutions choose their kernels by it."""

from __future__ import annotations

import pytest
import torch

from producer.tensor_input import to_tensor_file
from worker.latent_io import read_latents


def arrived(latents: torch.Tensor) -> torch.Tensor:
    dtype = str(latents.dtype).removeprefix("torch.")
    data = to_tensor_file(latents, max_bytes=1 << 20).data
    return read_latents(data, shape=tuple(latents.shape), dtype=dtype)


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
