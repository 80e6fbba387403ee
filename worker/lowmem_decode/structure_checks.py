"""What is asked of a module before it is believed to be what its class says."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from worker.lowmem_decode.steps import Attention


class UnsupportedStructure(ValueError):
    """This module cannot be decoded operator by operator."""


def require(condition: bool, reason: str) -> None:
    """Refuses the module unless `condition` holds."""
    if not condition:
        raise UnsupportedStructure(f"no low-memory decoder: {reason}")


def exactly(module: Any, kind: type, where: str) -> Any:
    """`module`, whose class must be `kind` itself."""
    require(type(module) is kind, f"{where} is a {type(module).__name__}, not a {kind.__name__}")
    return module


def untouched(module: nn.Module, where: str) -> None:
    """Refuses what runs, or is, something else than its class says."""
    require("forward" not in vars(module), f"forward of {where} was replaced")
    require(not module._forward_hooks and not module._forward_pre_hooks, f"{where} has hooks")
    plain = all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
    require(plain, f"{where} has parameters of a special kind")


def drops(decoder: nn.Module) -> bool:
    """Whether a decode in training mode would leave activations out."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in decoder.modules())


def plain_conv(conv: Any, size: int, where: str) -> Any:
    """A square convolution that keeps the size, zeros around."""
    exactly(conv, nn.Conv2d, where)
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    wanted = ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros")
    require(found == wanted, f"{where} is not a plain {size}×{size} convolution")
    return conv


def group_norm(norm: Any, where: str) -> Any:
    """A GroupNorm that scales and shifts."""
    exactly(norm, nn.GroupNorm, where)
    require(norm.affine and norm.bias is not None, f"{where} has no weight and bias")
    return norm


def self_attention(block: Any, where: str) -> Attention:
    """The attention that the mid-blocks of most families share."""
    exactly(block, DiffusersAttention, where)
    processor = type(block.processor)
    require(processor in (AttnProcessor, AttnProcessor2_0), f"{where} uses {processor.__name__}")
    extras = (block.spatial_norm, block.norm_q, block.norm_k, getattr(block, "norm_cross", None) or None)
    require(all(extra is None for extra in extras), f"{where} normalises in an unknown way")
    return Attention(
        norm=None if block.group_norm is None else group_norm(block.group_norm, f"{where}.group_norm"),
        query=exactly(block.to_q, nn.Linear, f"{where}.to_q"),
        key=exactly(block.to_k, nn.Linear, f"{where}.to_k"),
        value=exactly(block.to_v, nn.Linear, f"{where}.to_v"),
        out=exactly(block.to_out[0], nn.Linear, f"{where}.to_out"),
        heads=int(block.heads),
        residual=bool(block.residual_connection),
        scale=float(block.rescale_output_factor),
    )
