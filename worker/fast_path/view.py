"""A second decoder on the same weights: other memory format, norms fused with SiLU, for decode only.

What diffusers loaded is never changed, since exact and low-memory decodes run on it. The view is a shallow copy of the
autoencoder without its encoder; its decoder is a copy of the modules, not of the parameters. So the class is the same,
and whatever works on the autoencoder (tiling, frame streams, numerical safety) works on the view. Weights in another
dtype are the exception: those are copied.

As in the low-memory decoder, what was changed after loading (hooks, replaced methods, quantised weights) may mean
something, and is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from worker.fast_path.families import FORMATS, family_of
from worker.fast_path.norm_silu import RMS_NORMS, GroupNormSiLU, RmsNormSiLU

#: Class → its norms that SiLU follows, and the attribute that holds the SiLU. Whatever else the class does with either
#: is ruled out in `_fusible`. Sources: `forward` of these classes in diffusers 0.42.
_FUSED: Final[Mapping[str, tuple[tuple[str, ...], str]]] = {
    "ResnetBlock2D": (("norm1", "norm2"), "nonlinearity"),
    "Decoder": (("conv_norm_out",), "conv_act"),
    "HunyuanImageResnetBlock": (("norm1", "norm2"), "nonlinearity"),
    "HunyuanImageDecoder2D": (("norm_out",), "nonlinearity"),
    "HunyuanVideoResnetBlockCausal3D": (("norm1", "norm2"), "nonlinearity"),
    "HunyuanVideoDecoder3D": (("conv_norm_out",), "conv_act"),
    "WanResidualBlock": (("norm1", "norm2"), "nonlinearity"),
    "WanDecoder3d": (("norm_out",), "nonlinearity"),
    "QwenImageResidualBlock": (("norm1", "norm2"), "nonlinearity"),
    "QwenImageDecoder3d": (("norm_out",), "nonlinearity"),
}
#: What a decode does not call; Qwen-Image's counts the encoder's modules all the same, so something must be there.
_ENCODER_PARTS: Final = ("encoder", "quant_conv")


def refusal(module: Any) -> str | None:
    """Why `module` has no fast way; None if it has."""
    if family_of(module) is None:
        return f"nothing is known of {type(module).__name__}"
    for name in ("decode", "_decode", "forward"):
        if name in vars(module):
            return f"{name} of the VAE was replaced"
    if module.decoder.training:
        return "the VAE is in training mode"
    for name, part in module.decoder.named_modules():
        if "forward" in vars(part):
            return f"forward of decoder.{name} was replaced"
        if part._forward_hooks or part._forward_pre_hooks:
            return f"decoder.{name} has hooks"
        if any(type(parameter) is not nn.Parameter for parameter in part.parameters(recurse=False)):
            return f"decoder.{name} has parameters of a special kind"
    return None


def view_of(module: Any, *, memory_format: str, dtype: torch.dtype) -> Any:
    """An autoencoder that decodes as `module` does, to rounding.

    Args:
        module: one that `refusal` has nothing against.
        memory_format: of its activations, a name in `FORMATS`.
        dtype: of its weights; one that differs from the module's costs a copy of them.
    """
    other_dtype = None if dtype == module.dtype else dtype
    view = copy.copy(module)  # its __dict__ is new, what that holds is shared
    view.__dict__["_modules"] = {
        name: nn.Module() if name in _ENCODER_PARTS else None if part is None else _copy(part, other_dtype)
        for name, part in module._modules.items()
    }
    for part in list(view.decoder.modules()):
        _fuse(part)
    if memory_format != "contiguous":
        for conv in view.decoder.modules():
            if isinstance(conv, nn.Conv2d | nn.Conv3d):
                _feed(conv, memory_format)
    return view


def fused_norms(view: Any) -> int:
    """How many norms of a view are one with their SiLU."""
    return sum(isinstance(part, GroupNormSiLU | RmsNormSiLU) for part in view.decoder.modules())


def _copy(part: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Modules of their own on the same parameters; on copies of them if they are to have another dtype."""
    if dtype is not None:
        return copy.deepcopy(part).to(dtype)
    return copy.deepcopy(part, {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())})


def _fuse(part: nn.Module) -> None:
    norms, activation = _FUSED.get(type(part).__name__, ((), ""))
    if not norms or not _fusible(part, norms, activation):
        return
    for name in norms:
        norm = getattr(part, name)
        setattr(part, name, GroupNormSiLU(norm) if type(norm) is nn.GroupNorm else RmsNormSiLU(norm))
    setattr(part, activation, nn.Identity())


def _fusible(part: Any, norms: tuple[str, ...], activation: str) -> bool:
    if type(getattr(part, activation)) is not nn.SiLU:
        return False
    if getattr(part, "time_emb_proj", None) is not None or getattr(part, "time_embedding_norm", None) == "scale_shift":
        return False  # SiLU is for the embedding, too; a shift comes between
    return all(_known(getattr(part, name)) for name in norms)


def _known(norm: Any) -> bool:
    if type(norm) is nn.GroupNorm:
        return norm.affine and norm.bias is not None
    return type(norm).__name__ in RMS_NORMS and bool(norm.channel_first)


def _feed(conv: nn.Module, memory_format: str) -> None:
    """Gives a convolution its input in the format; it answers in kind. Nothing is copied that is in it already.

    Every one, since some operators between them (reshapes over time) answer contiguous.
    """
    flat = memory_format == "channels_last_3d" and isinstance(conv, nn.Conv2d)
    wanted = FORMATS["channels_last" if flat else memory_format]

    def reformat(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0].contiguous(memory_format=wanted), *arguments[1:])

    conv.register_forward_pre_hook(reformat)
