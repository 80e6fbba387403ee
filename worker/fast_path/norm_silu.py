"""A norm and the SiLU after it as one module, which shares the norm's parameters.

On CUDA both are one pass of Triton kernels where triton is there and gives the right numbers; elsewhere, and inside a
compiled graph, they are torch's own operators, SiLU in place on what the norm made.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger(__name__)

#: Classes of RMS norms whose `forward` is normalize(x, dim=1) · scale · gamma + bias: Wan's and its copies.
RMS_NORMS: Final = frozenset({"WanRMS_norm", "QwenImageRMS_norm"})
_EPS_OF_NORMALIZE: Final = 1e-12  # torch.nn.functional.normalize


class GroupNormSiLU(nn.Module):
    """silu(group_norm(x))."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        """Args:
        norm: affine; its parameters are shared.
        """
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.num_groups, self.eps = norm.num_groups, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, …) → the same shape and, where that is contiguous or channels_last, the same memory format."""
        kernels = _kernels_for(x)
        if kernels is not None:
            fused: torch.Tensor = kernels.group_norm_silu(
                x, self.weight, self.bias, groups=self.num_groups, eps=self.eps
            )
            return fused
        return F.silu(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps), inplace=True)


class RmsNormSiLU(nn.Module):
    """silu(rms_norm(x)), over channels."""

    def __init__(self, norm: Any) -> None:
        """Args:
        norm: of a class in `RMS_NORMS`, channels first; its parameters are shared.
        """
        super().__init__()
        self.gamma = norm.gamma
        self.bias = norm.bias if isinstance(norm.bias, nn.Parameter) else None
        self.scale = float(norm.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, …) → the same shape and memory format.

        Source: diffusers autoencoders/autoencoder_kl_wan.py `WanRMS_norm.forward`.
        """
        kernels = _kernels_for(x)
        if kernels is not None:
            fused: torch.Tensor = kernels.rms_norm_silu(
                x, self.gamma, self.bias, scale=self.scale, eps=_EPS_OF_NORMALIZE
            )
            return fused
        half = x.dtype in (torch.float16, torch.bfloat16)
        normal = F.normalize(x.float() if half else x, dim=1, eps=_EPS_OF_NORMALIZE).to(x.dtype)
        out = normal * self.scale * self.gamma
        return F.silu(out if self.bias is None else out + self.bias, inplace=True)


def _kernels_for(x: torch.Tensor) -> Any:
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return None
    kernels = triton_kernels(x.device)
    return kernels if kernels is not None and kernels.takes(x) else None


@functools.cache
def triton_kernels(device: torch.device) -> Any:
    """The module of Triton kernels, tried once on `device`; None where it cannot be had or gives wrong numbers."""
    if device.type != "cuda":
        return None
    try:
        kernels: Any = importlib.import_module("worker.fast_path.triton_norms")
        apart = _try_out(kernels, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no triton, no C compiler, a GPU too old: each fails in its own way
        logger.warning(
            "norms are not fused on %s: %s: %s",
            device,
            type(error).__name__,
            error,
            extra={"action": "fused_norms_off"},
        )
        return None
    if apart > _MOST_APART:
        logger.warning("fused norms are %g off on %s: not used", apart, device, extra={"action": "fused_norms_off"})
        return None
    return kernels


#: A float32 norm of numbers with mean 3 and deviation 2 is to be as near as this to torch's.
_MOST_APART: Final = 1e-4


def _try_out(kernels: Any, device: torch.device) -> float:
    x = torch.randn(2, 64, 40, 30, device=device, generator=torch.Generator(device).manual_seed(0)) * 2 + 3
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = x[0, :, 0, 0].contiguous(), x[1, :, 0, 0].contiguous()
    found = kernels.group_norm_silu(x, weight, bias, groups=8, eps=1e-6)
    wanted = F.silu(F.group_norm(x, 8, weight, bias, 1e-6))
    return float((found - wanted).abs().max())
