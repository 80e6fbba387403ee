"""Norms over the channels of a pixel: no statistics of an activation, so a row is normalised as soon as it is there.

Each does what the module's own forward does, with the channels last, and rounds where that rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Norm = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class L2Norm:
    """To length √C, times `gamma`.

    Source: diffusers autoencoder_kl_wan.py `WanRMS_norm.forward`, and its copies for Qwen-Image and HunyuanVideo 1.5.
    """

    module: Any

    def __call__(self, strip: torch.Tensor) -> torch.Tensor:
        half = strip.dtype in (torch.float16, torch.bfloat16)
        out = F.normalize(strip.float() if half else strip, dim=-1).to(strip.dtype)
        return out.mul_(self.module.scale).mul_(self.module.gamma.flatten())


@dataclass(frozen=True, kw_only=True, slots=True)
class RootMeanSquareNorm:
    """To a mean square of 1, in float32.

    Source: diffusers normalization.py `RMSNorm.forward`, without a weight.
    """

    eps: float

    def __call__(self, strip: torch.Tensor) -> torch.Tensor:
        variance = strip.float().pow(2).mean(-1, keepdim=True)
        return (strip * torch.rsqrt(variance + self.eps)).to(strip.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnDtypeNorm:
    """To a mean square of 1, in the activation's dtype.

    Source: diffusers autoencoder_kl_ltx2.py `PerChannelRMSNorm.forward`.
    """

    eps: float

    def __call__(self, strip: torch.Tensor) -> torch.Tensor:
        return strip / torch.sqrt(torch.mean(strip**2, dim=-1, keepdim=True) + self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Modulated:
    """A norm, then a scale and a shift of each channel."""

    norm: Norm
    scale: torch.Tensor
    shift: torch.Tensor

    def __call__(self, strip: torch.Tensor) -> torch.Tensor:
        return self.norm(strip).mul_(1 + self.scale).add_(self.shift)
