"""Reads a diffusers autoencoder whose norms are per pixel into steps, or says why it cannot.

As in `worker.lowmem_decode.structure`: classes are compared exactly, hooks and replaced methods are refused, and every
parameter of the decoder must have been met on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from torch import nn

from worker.lowmem_decode.pixel_norm.checks import UnsupportedStructure, drops, require, untouched
from worker.lowmem_decode.pixel_norm.hunyuan_video15 import read_hunyuan_video15
from worker.lowmem_decode.pixel_norm.ltx import read_ltx
from worker.lowmem_decode.pixel_norm.steps import Program
from worker.lowmem_decode.pixel_norm.wan import read_wan

_READERS: Final[Mapping[type, Callable[[Any, torch.Tensor | None], Program]]] = {
    AutoencoderKLWan: read_wan,
    AutoencoderKLQwenImage: read_wan,
    AutoencoderKLHunyuanVideo15: read_hunyuan_video15,
    AutoencoderKLLTXVideo: read_ltx,
    AutoencoderKLLTX2Video: read_ltx,
}


def knows(module: Any) -> bool:
    """Whether a module is of one of the classes read here."""
    return type(module) in _READERS


def read(vae: Any, temb: torch.Tensor | None = None, *, only_shapes: bool = False) -> Program:
    """The steps of a VAE's decode.

    Args:
        vae: the VAE.
        temb: the timestep, (1), of a VAE that is conditioned on one.
        only_shapes: the steps will not be run, so that a timestep need not be known.

    Raises:
        UnsupportedStructure: something about it is not known; the message says what.
        ValueError: the timestep is missing.
    """
    reader = _READERS.get(type(vae))
    if reader is None:
        raise UnsupportedStructure(f"no low-memory decoder for {type(vae).__name__}")
    for name in ("decode", "_decode", "forward"):
        require(name not in vars(vae), f"{name} of the VAE was replaced")
    require(not vae.use_tiling, "the VAE is set to decode in tiles")
    require(not getattr(vae, "use_framewise_decoding", False), "the VAE is set to decode in tiles over time")
    require(not vae.decoder.training or not drops(vae.decoder), "the VAE is in training mode and drops activations")
    for name, module in vae.decoder.named_modules():
        untouched(module, f"decoder.{name}")
    conditioned = bool(vae.config.get("timestep_conditioning", False))
    if conditioned and temb is None:
        if not only_shapes:
            raise ValueError("temb is missing, which this VAE decodes by")
        temb = torch.zeros(1, device=vae.device, dtype=vae.dtype)
    program = reader(vae, temb if conditioned else None)
    parameters = list(vae.decoder.parameters())
    met = {id(p) for module in _modules((program.segments, program.attentions, program.read)) for p in module}
    require(met >= {id(p) for p in parameters}, "it has further parameters")
    kinds = {(p.dtype, p.device) for p in parameters}
    require(len(kinds) == 1, "its parameters differ in dtype or device")
    require(program.device.type != "meta", "its weights are not loaded")
    return program


def _modules(value: Any) -> Iterator[Iterator[nn.Parameter]]:
    """The parameters of each module that steps refer to."""
    if isinstance(value, nn.Module):
        yield value.parameters()
    elif isinstance(value, nn.Parameter):
        yield iter([value])
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _modules(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _modules(getattr(value, each.name))
    elif hasattr(value, "conv"):
        yield from _modules(value.conv)
