"""Reads the autoencoders of clips into steps: the part of `structure` that knows their modules.

Sources: diffusers autoencoders/autoencoder_kl_hunyuan_video.py.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as hunyuan
from torch import nn

from worker.lowmem_decode.clip_conv import ClipConv
from worker.lowmem_decode.steps import ClipUpsample, Entry, Head, Parts, Resnet, Step
from worker.lowmem_decode.structure_checks import exactly, group_norm, require, self_attention, untouched


def _plain_conv3d(conv: Any, size: int, where: str) -> Any:
    """A cubic convolution that pads nothing itself."""
    exactly(conv, nn.Conv3d, where)
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    wanted = ((size,) * 3, (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
    require(found == wanted, f"{where} is not a plain {size}×{size}×{size} convolution")
    return conv


# AutoencoderKLHunyuanVideo ------------------------------------------------------------------------------


def read_hunyuan_video(vae: Any) -> Parts:
    """The steps of an AutoencoderKLHunyuanVideo's decoder, for clips that are decoded as one tile."""
    decoder = exactly(vae.decoder, hunyuan.HunyuanVideoDecoder3D, "decoder")
    before = _plain_conv3d(vae.post_quant_conv, 1, "post_quant_conv")
    untouched(before, "post_quant_conv")
    middle = exactly(decoder.mid_block, hunyuan.HunyuanVideoMidBlock3D, "decoder.mid_block")
    steps: list[Step] = [_resnet(middle.resnets[0], "decoder.mid_block.resnets.0")]
    for number, (attention, block) in enumerate(zip(middle.attentions, middle.resnets[1:], strict=True)):
        if attention is not None:
            steps.append(self_attention(attention, f"decoder.mid_block.attentions.{number}"))
        steps.append(_resnet(block, f"decoder.mid_block.resnets.{number + 1}"))
    for number, up in enumerate(decoder.up_blocks):
        where = f"decoder.up_blocks.{number}"
        exactly(up, hunyuan.HunyuanVideoUpBlock3D, where)
        steps.extend(_resnet(block, f"{where}.resnets") for block in up.resnets)
        steps.extend(_upsample(upsample, f"{where}.upsamplers") for upsample in up.upsamplers or ())
    exactly(decoder.conv_act, nn.SiLU, "decoder.conv_act")
    return Parts(
        entry=Entry(before=before, conv=_causal_conv(decoder.conv_in, 3, "conv_in")),
        steps=tuple(steps),
        head=Head(
            norm=group_norm(decoder.conv_norm_out, "conv_norm_out"), conv=_causal_conv(decoder.conv_out, 3, "conv_out")
        ),
        kernel=ClipConv,
        is_clip=True,
    )


def _causal_conv(conv: Any, size: int, where: str) -> Any:
    exactly(conv, hunyuan.HunyuanVideoCausalConv3d, where)
    half = size // 2
    padded = conv.pad_mode == "replicate" and conv.time_causal_padding == (half, half, half, half, size - 1, 0)
    require(padded, f"{where} pads in an unknown way")
    return _plain_conv3d(conv.conv, size, f"{where}.conv")


def _resnet(block: Any, where: str) -> Resnet:
    exactly(block, hunyuan.HunyuanVideoResnetBlockCausal3D, where)
    exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    shortcut = block.conv_shortcut
    return Resnet(
        norm1=group_norm(block.norm1, f"{where}.norm1"),
        conv1=_causal_conv(block.conv1, 3, f"{where}.conv1"),
        norm2=group_norm(block.norm2, f"{where}.norm2"),
        conv2=_causal_conv(block.conv2, 3, f"{where}.conv2"),
        shortcut=None if shortcut is None else _causal_conv(shortcut, 1, f"{where}.conv_shortcut"),
    )


def _upsample(block: Any, where: str) -> ClipUpsample:
    exactly(block, hunyuan.HunyuanVideoUpsampleCausal3D, where)
    factor = tuple(block.upsample_factor)
    require(factor in ((1, 2, 2), (2, 2, 2)), f"{where} upsamples by {factor}")
    return ClipUpsample(conv=_causal_conv(block.conv, 3, f"{where}.conv"), twice_the_frames=factor[0] == 2)
