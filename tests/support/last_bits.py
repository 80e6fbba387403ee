"""How much of a picture the rounding of bfloat16 decides: what a decode becomes if a few last bits change on its way.

Two decodes that round at other places cannot be nearer to each other than a decode is to itself with one last bit in
fifty changed in the outputs of its first convolution. With trained weights that is little. Random weights amplify it,
some until it is as large as the whole error of bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

#: Part of the outputs that change.
_SHARE = 0.02
_SEEDS = 3


def psnr_db(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Peak signal to noise in dB, the range of `expected` being the peak; infinite where they are equal."""
    error = (got.double() - expected.double()).square().mean().item()
    peak = (expected.max() - expected.min()).double().item()
    return 10 * math.log10(peak**2 / error) if error else math.inf


def rounding_db(vae: Any, decode: Callable[[], torch.Tensor]) -> float:
    """How near `decode()` is to itself with a few last bits changed: the least PSNR of some tries.

    Args:
        vae: a diffusers autoencoder in bfloat16, whose decoder begins with a convolution.
        decode: decodes something with it.
    """
    expected = decode()
    found = []
    for seed in range(_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        hook = vae.decoder.conv_in.register_forward_hook(lambda *call: _changed(call[-1], generator))  # noqa: B023
        try:
            found.append(psnr_db(decode(), expected))
        finally:
            hook.remove()
    return min(found)


def _changed(output: Any, generator: torch.Generator) -> Any:
    if isinstance(output, tuple):  # CogVideoX hands on what the next frames need
        return (_changed(output[0], generator), *output[1:])
    chosen = torch.rand(output.shape, generator=generator) < _SHARE
    bits = output.contiguous().view(torch.int16)
    return torch.where(chosen, bits ^ 1, bits).view(output.dtype)
