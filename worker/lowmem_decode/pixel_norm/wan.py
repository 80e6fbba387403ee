"""Wan 2.1 and 2.2, and Qwen-Image, whose decoder is Wan 2.1's under other names.

Sources: diffusers autoencoder_kl_wan.py `WanDecoder3d` and `AutoencoderKLWan._decode`; autoencoder_kl_qwenimage.py
likewise. Decoded latent frame by latent frame there; the first makes one frame, each other one as many as frames are
doubled.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_qwenimage, autoencoder_kl_wan
from torch import nn

from worker.lowmem_decode.pixel_norm.checks import exactly, require, sized, untouched
from worker.lowmem_decode.pixel_norm.kernels import Conv3x3x3, NearestConv3x3
from worker.lowmem_decode.pixel_norm.norms import L2Norm
from worker.lowmem_decode.pixel_norm.spreads import Shuffle
from worker.lowmem_decode.pixel_norm.steps import Added, Attention, Conv, FramesUpsample, Program, Step


def read_wan(vae: Any, temb: torch.Tensor | None) -> Program:
    """The steps of an AutoencoderKLWan or AutoencoderKLQwenImage."""
    wan = type(vae) is autoencoder_kl_wan.AutoencoderKLWan
    reader = _Reader(autoencoder_kl_wan, "Wan") if wan else _Reader(autoencoder_kl_qwenimage, "QwenImage")
    before = reader.conv(vae.post_quant_conv, (1, 1, 1), "post_quant_conv")
    untouched(before, "post_quant_conv")
    decoder = reader.exactly(vae.decoder, "Decoder3d", "decoder")
    exactly(decoder.nonlinearity, nn.SiLU, "decoder.nonlinearity")
    segments, attentions = reader.middle(decoder)
    for number, block in enumerate(decoder.up_blocks):
        segments[-1].append(reader.up_block(block, f"decoder.up_blocks.{number}"))
    segments[-1].append(reader.normed_conv(decoder.norm_out, decoder.conv_out, "decoder.conv_out"))
    patch = vae.config.get("patch_size") or 1
    return Program(
        before=before,
        segments=tuple(tuple(_flat(segment)) for segment in segments),
        attentions=tuple(attentions),
        patches=Shuffle(factor=int(patch), order="channel first, columns first"),
        clamps=True,
        causal=True,
        frames_per_call=1,
        dtype=decoder.conv_in.weight.dtype,
        device=decoder.conv_in.weight.device,
        latent_channels=int(before.in_channels),
    )


def _flat(steps: list[Any]) -> list[Step]:
    return [step for each in steps for step in (each if isinstance(each, list) else [each])]


class _Reader:
    """Reads blocks whose classes have a prefix to their names."""

    def __init__(self, module: ModuleType, prefix: str) -> None:
        self._module = module
        self._prefix = prefix

    def exactly(self, module: Any, name: str, where: str) -> Any:
        return exactly(module, getattr(self._module, self._prefix + name), where)

    def conv(self, conv: Any, size: tuple[int, int, int], where: str) -> Any:
        self.exactly(conv, "CausalConv3d", where)
        frames, rows, columns = (extent // 2 for extent in size)
        sized(conv, size, (0, 0, 0), where)
        wanted = (columns, columns, rows, rows, 2 * frames, 0)
        require(tuple(conv._padding) == wanted, f"{where} is padded in an unknown way")
        return conv

    def norm(self, norm: Any, where: str) -> L2Norm:
        self.exactly(norm, "RMS_norm", where)
        require(norm.channel_first and not isinstance(norm.bias, nn.Parameter), f"{where} is of an unknown form")
        require(norm.bias == 0.0, f"{where} has a bias")
        return L2Norm(module=norm)

    def normed_conv(self, norm: Any, conv: Any, where: str) -> Conv:
        conv = self.conv(conv, (3, 3, 3), where)
        return Conv(kernel=Conv3x3x3(conv), norm=self.norm(norm, f"{where}, its norm"))

    def middle(self, decoder: Any) -> tuple[list[list[Any]], list[Attention]]:
        """Segments up to the end of the mid-block, and the attentions between them."""
        block = self.exactly(decoder.mid_block, "MidBlock", "decoder.mid_block")
        first = Conv(kernel=Conv3x3x3(self.conv(decoder.conv_in, (3, 3, 3), "decoder.conv_in")))
        segments: list[list[Any]] = [[first, self.resnet(block.resnets[0], "decoder.mid_block.resnets.0")]]
        attentions = []
        for number, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:], strict=True)):
            if attention is not None:
                attentions.append(self.attention(attention, f"decoder.mid_block.attentions.{number}"))
                segments.append([])
            segments[-1].append(self.resnet(resnet, f"decoder.mid_block.resnets.{number + 1}"))
        return segments, attentions

    def resnet(self, block: Any, where: str) -> Added:
        self.exactly(block, "ResidualBlock", where)
        exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
        shortcut = block.conv_shortcut
        if type(shortcut) is nn.Identity:
            shortcut = None
        return Added(
            steps=(
                self.normed_conv(block.norm1, block.conv1, f"{where}.conv1"),
                self.normed_conv(block.norm2, block.conv2, f"{where}.conv2"),
            ),
            conv=None if shortcut is None else self.conv(shortcut, (1, 1, 1), f"{where}.conv_shortcut"),
        )

    def attention(self, block: Any, where: str) -> Attention:
        self.exactly(block, "AttentionBlock", where)
        for conv in (block.to_qkv, block.proj):
            exactly(conv, nn.Conv2d, where)
            sized(conv, (1, 1), (0, 0), where)
        return Attention(
            norm=self.norm(block.norm, f"{where}.norm"), projections=(block.to_qkv,), out=block.proj, over_frames=False
        )

    def up_block(self, block: Any, where: str) -> list[Step] | Added:
        steps: list[Step] = [self.resnet(resnet, f"{where}.resnets") for resnet in block.resnets]
        if type(block) is not getattr(self._module, "WanResidualUpBlock", None):
            self.exactly(block, "UpBlock", where)
            for upsampler in block.upsamplers or ():
                steps += self.upsample(upsampler, f"{where}.upsamplers")
            return steps
        if block.upsampler is not None:
            steps += self.upsample(block.upsampler, f"{where}.upsampler")
        shortcut = block.avg_shortcut
        if shortcut is None:
            return steps
        exactly(shortcut, autoencoder_kl_wan.DupUp3D, f"{where}.avg_shortcut")
        spread = Shuffle(factor=shortcut.factor_s, frames=shortcut.factor_t, repeats=shortcut.repeats)
        return Added(steps=tuple(steps), spread=spread)

    def upsample(self, block: Any, where: str) -> list[Step]:
        self.exactly(block, "Resample", where)
        require(block.mode in ("upsample2d", "upsample3d"), f"{where} is no upsample")
        nearest, conv = block.resample
        self.exactly(nearest, "Upsample", where)
        doubles = tuple(nearest.scale_factor) == (2.0, 2.0) and nearest.mode == "nearest-exact" and nearest.size is None
        require(doubles, f"{where} is not a nearest-neighbour upsample by two")
        exactly(conv, nn.Conv2d, where)
        sized(conv, (3, 3), (1, 1), where)
        steps: list[Step] = [Conv(kernel=NearestConv3x3(conv))]
        if block.mode == "upsample3d":
            steps.insert(0, FramesUpsample(conv=self.conv(block.time_conv, (3, 1, 1), f"{where}.time_conv")))
        return steps
