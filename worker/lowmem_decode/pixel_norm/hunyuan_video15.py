"""HunyuanVideo 1.5.

Sources: diffusers autoencoder_kl_hunyuanvideo15.py `HunyuanVideo15Decoder3D`. Decoded as a whole there; since nothing
looks ahead (its attention has a causal mask), frames can go through in groups all the same.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15 as hunyuan
from torch import nn

from worker.lowmem_decode.pixel_norm.checks import exactly, require, sized
from worker.lowmem_decode.pixel_norm.kernels import Conv3x3x3
from worker.lowmem_decode.pixel_norm.norms import L2Norm
from worker.lowmem_decode.pixel_norm.spreads import FirstApart, Repeated, Shuffle, Spread
from worker.lowmem_decode.pixel_norm.steps import Added, Attention, Conv, Program, Step

#: What F.pad adds on each side, the last axis first.
_CAUSAL_PADDING: Final = (1, 1, 1, 1, 2, 0)


def read_hunyuan_video15(vae: Any, temb: torch.Tensor | None) -> Program:
    """The steps of an AutoencoderKLHunyuanVideo15."""
    decoder = exactly(vae.decoder, hunyuan.HunyuanVideo15Decoder3D, "decoder")
    block = exactly(decoder.mid_block, hunyuan.HunyuanVideo15MidBlock, "decoder.mid_block")
    entry = Added(steps=(_conv(decoder.conv_in, "decoder.conv_in"),), spread=Repeated(repeats=int(decoder.repeat)))
    segments: list[list[Step]] = [[entry, _resnet(block.resnets[0], "decoder.mid_block.resnets.0")]]
    attentions = []
    for number, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:], strict=True)):
        if attention is not None:
            attentions.append(_attention(attention, f"decoder.mid_block.attentions.{number}"))
            segments.append([])
        segments[-1].append(_resnet(resnet, f"decoder.mid_block.resnets.{number + 1}"))
    for number, up in enumerate(decoder.up_blocks):
        where = f"decoder.up_blocks.{number}"
        exactly(up, hunyuan.HunyuanVideo15UpBlock3D, where)
        segments[-1] += [_resnet(resnet, f"{where}.resnets") for resnet in up.resnets]
        segments[-1] += [_upsample(upsample, f"{where}.upsamplers") for upsample in up.upsamplers or ()]
    exactly(decoder.conv_act, nn.SiLU, "decoder.conv_act")
    segments[-1].append(_conv(decoder.conv_out, "decoder.conv_out", norm=decoder.norm_out))
    first = decoder.conv_in.conv
    return Program(
        before=None,
        segments=tuple(tuple(segment) for segment in segments),
        attentions=tuple(attentions),
        patches=Shuffle(factor=1),
        clamps=False,
        causal=True,
        frames_per_call=None,
        dtype=first.weight.dtype,
        device=first.weight.device,
        latent_channels=int(first.in_channels),
    )


def _conv(conv: Any, where: str, *, norm: Any | None = None, spread: Spread | None = None) -> Conv:
    exactly(conv, hunyuan.HunyuanVideo15CausalConv3d, where)
    exactly(conv.conv, nn.Conv3d, where)
    sized(conv.conv, (3, 3, 3), (0, 0, 0), where)
    padded = conv.pad_mode == "replicate" and tuple(conv.time_causal_padding) == _CAUSAL_PADDING
    require(padded, f"{where} is padded in an unknown way")
    return Conv(
        kernel=Conv3x3x3(conv.conv),
        norm=None if norm is None else _norm(norm, f"{where}, its norm"),
        spread=spread,
        edge="replicate",
        frames_edge="replicate",
    )


def _norm(norm: Any, where: str) -> L2Norm:
    exactly(norm, hunyuan.HunyuanVideo15RMS_norm, where)
    require(norm.channel_first and not isinstance(norm.bias, nn.Parameter), f"{where} is of an unknown form")
    require(norm.bias == 0.0, f"{where} has a bias")
    return L2Norm(module=norm)


def _point(conv: Any, where: str) -> Any:
    exactly(conv, nn.Conv3d, where)
    sized(conv, (1, 1, 1), (0, 0, 0), where)
    return conv


def _resnet(block: Any, where: str) -> Added:
    exactly(block, hunyuan.HunyuanVideo15ResnetBlock, where)
    exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    shortcut = block.conv_shortcut
    return Added(
        steps=(
            _conv(block.conv1, f"{where}.conv1", norm=block.norm1),
            _conv(block.conv2, f"{where}.conv2", norm=block.norm2),
        ),
        conv=None if shortcut is None else _point(shortcut, f"{where}.conv_shortcut"),
    )


def _attention(block: Any, where: str) -> Attention:
    exactly(block, hunyuan.HunyuanVideo15AttnBlock, where)
    projections = tuple(_point(conv, where) for conv in (block.to_q, block.to_k, block.to_v))
    return Attention(
        norm=_norm(block.norm, f"{where}.norm"),
        projections=projections,
        out=_point(block.proj_out, f"{where}.proj_out"),
        over_frames=True,
    )


def _upsample(block: Any, where: str) -> Added:
    exactly(block, hunyuan.HunyuanVideo15Upsample, where)
    repeats = int(block.repeats)
    if block.add_temporal_upsample:
        require(repeats >= 2 and repeats % 2 == 0, f"{where} has more channels than it can spread")
        conv = _conv(block.conv, f"{where}.conv", spread=FirstApart())
        return Added(steps=(conv,), spread=FirstApart(repeats=repeats))
    conv = _conv(block.conv, f"{where}.conv", spread=Shuffle(factor=2, order="channel last"))
    return Added(steps=(conv,), spread=Shuffle(factor=2, order="channel last", repeats=repeats))
