"""Reads the autoencoders of clips into steps: the part of `structure` that knows their modules.

Sources: diffusers autoencoders/autoencoder_kl_hunyuan_video.py, autoencoder_kl_mochi.py, autoencoder_kl_cogvideox.py
with upsampling.py `CogVideoXUpsample3D`.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders import autoencoder_kl_cogvideox as cogvideox
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as hunyuan
from diffusers.models.autoencoders import autoencoder_kl_mochi as mochi
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch import nn

from worker.lowmem_decode.clip_conv import ClipConv, Pointwise
from worker.lowmem_decode.frame_caches import Past
from worker.lowmem_decode.row_conv import Kernel
from worker.lowmem_decode.steps import (
    ClipUpsample,
    Entry,
    FramewiseUpsample,
    Head,
    Parts,
    Resnet,
    SpatialNorm,
    Step,
    Unfold,
)
from worker.lowmem_decode.structure_checks import (
    exactly,
    group_norm,
    plain_conv,
    require,
    self_attention,
    untouched,
)


def _plain_conv3d(conv: Any, size: int, where: str) -> Any:
    """A cubic convolution that pads nothing itself."""
    exactly(conv, nn.Conv3d, where)
    _require_cube(conv, size, (0, 0, 0), where)
    return conv


def _require_cube(conv: Any, size: int, padding: tuple[int, ...], where: str) -> None:
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    wanted = ((size,) * 3, (1, 1, 1), padding, (1, 1, 1), 1, "zeros")
    require(found == wanted, f"{where} is not a plain {size}×{size}×{size} convolution")


def _kernel(conv: Any, past: Past | None) -> Kernel:
    """Edges repeated, as HunyuanVideo and Mochi have them; Mochi ends with a product with a matrix."""
    return Pointwise(conv) if type(conv) is nn.Linear else ClipConv(conv, past=past)


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
        kernel=_kernel,
        is_clip=True,
        over_time="tiles",
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


# AutoencoderKLMochi -------------------------------------------------------------------------------------


def read_mochi(vae: Any) -> Parts:
    """The steps of an AutoencoderKLMochi's decoder."""
    # its way by groups of frames pads otherwise than it was trained, and gives other clips
    require(not vae.use_framewise_decoding, "it decodes by groups of frames")
    decoder = exactly(vae.decoder, mochi.MochiDecoder3D, "decoder")
    exactly(decoder.nonlinearity, nn.SiLU, "decoder.nonlinearity")
    steps = _mochi_blocks(decoder.block_in, mochi.MochiMidBlock3D, "decoder.block_in")
    for number, up in enumerate(decoder.up_blocks):
        where = f"decoder.up_blocks.{number}"
        steps += _mochi_blocks(up, mochi.MochiUpBlock3D, where)
        require(up.spatial_expansion == 2, f"{where} expands rows and columns by {up.spatial_expansion}")
        steps.append(Unfold(linear=exactly(up.proj, nn.Linear, f"{where}.proj"), frames=int(up.temporal_expansion)))
    steps += _mochi_blocks(decoder.block_out, mochi.MochiMidBlock3D, "decoder.block_out")
    return Parts(
        entry=Entry(before=_plain_conv3d(decoder.conv_in, 1, "conv_in"), conv=None),
        steps=tuple(steps),
        head=Head(norm=None, conv=exactly(decoder.proj_out, nn.Linear, "proj_out")),
        kernel=_kernel,
        is_clip=True,
        per_frame=True,
        over_time="causal",
    )


def _mochi_blocks(blocks: Any, kind: type, where: str) -> list[Step]:
    exactly(blocks, kind, where)
    attentions = [block for block in getattr(blocks, "attentions", ()) if block is not None]
    require(not attentions, f"{where} has attention")
    return [_mochi_resnet(block, f"{where}.resnets.{number}") for number, block in enumerate(blocks.resnets)]


def _mochi_resnet(block: Any, where: str) -> Resnet:
    exactly(block, mochi.MochiResnetBlock3D, where)
    exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    return Resnet(
        norm1=_mochi_norm(block.norm1, f"{where}.norm1"),
        conv1=_cogvideox_conv(block.conv1, 3, f"{where}.conv1", pad_mode="replicate"),
        norm2=_mochi_norm(block.norm2, f"{where}.norm2"),
        conv2=_cogvideox_conv(block.conv2, 3, f"{where}.conv2", pad_mode="replicate"),
    )


def _mochi_norm(norm: Any, where: str) -> Any:
    exactly(norm, mochi.MochiChunkedGroupNorm3D, where)
    return group_norm(norm.norm_layer, f"{where}.norm_layer")


# AutoencoderKLCogVideoX ---------------------------------------------------------------------------------


def read_cogvideox(vae: Any) -> Parts:
    """The steps of an AutoencoderKLCogVideoX's decoder, for one of the groups of frames it decodes a clip in."""
    decoder = exactly(vae.decoder, cogvideox.CogVideoXDecoder3D, "decoder")
    require(vae.post_quant_conv is None, "it has a post_quant_conv")
    middle = exactly(decoder.mid_block, cogvideox.CogVideoXMidBlock3D, "decoder.mid_block")
    steps: list[Step] = [_cogvideox_resnet(block, "decoder.mid_block.resnets") for block in middle.resnets]
    for number, up in enumerate(decoder.up_blocks):
        where = f"decoder.up_blocks.{number}"
        exactly(up, cogvideox.CogVideoXUpBlock3D, where)
        steps.extend(_cogvideox_resnet(block, f"{where}.resnets") for block in up.resnets)
        steps.extend(_cogvideox_upsample(upsample, f"{where}.upsamplers") for upsample in up.upsamplers or ())
    exactly(decoder.conv_act, nn.SiLU, "decoder.conv_act")
    return Parts(
        entry=Entry(before=None, conv=_cogvideox_conv(decoder.conv_in, 3, "conv_in", pad_mode="first")),
        steps=tuple(steps),
        head=Head(
            norm=_spatial_norm(decoder.norm_out, "norm_out"),
            conv=_cogvideox_conv(decoder.conv_out, 3, "conv_out", pad_mode="first"),
        ),
        kernel=lambda conv, past: ClipConv(conv, past=past, zeros=True),
        is_clip=True,
        over_time="groups",
    )


def _cogvideox_conv(conv: Any, size: int, where: str, *, pad_mode: str) -> Any:
    exactly(conv, cogvideox.CogVideoXCausalConv3d, where)
    half = size // 2
    padded = (conv.pad_mode == "replicate") == (pad_mode == "replicate") and conv.time_kernel_size == size
    padded = padded and conv.time_causal_padding == (half, half, half, half, size - 1, 0)
    require(padded, f"{where} pads in an unknown way")
    exactly(conv.conv, cogvideox.CogVideoXSafeConv3d, f"{where}.conv")
    _require_cube(conv.conv, size, (0, 0, 0) if pad_mode == "replicate" else (0, half, half), f"{where}.conv")
    return conv.conv


def _cogvideox_resnet(block: Any, where: str) -> Resnet:
    exactly(block, cogvideox.CogVideoXResnetBlock3D, where)
    exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    shortcut = getattr(block, "conv_shortcut", None)
    if shortcut is not None:
        exactly(shortcut, cogvideox.CogVideoXSafeConv3d, f"{where}.conv_shortcut")
        _require_cube(shortcut, 1, (0, 0, 0), f"{where}.conv_shortcut")
    return Resnet(
        norm1=_spatial_norm(block.norm1, f"{where}.norm1"),
        conv1=_cogvideox_conv(block.conv1, 3, f"{where}.conv1", pad_mode="first"),
        norm2=_spatial_norm(block.norm2, f"{where}.norm2"),
        conv2=_cogvideox_conv(block.conv2, 3, f"{where}.conv2", pad_mode="first"),
        shortcut=shortcut,
    )


def _spatial_norm(norm: Any, where: str) -> SpatialNorm:
    exactly(norm, cogvideox.CogVideoXSpatialNorm3D, where)
    return SpatialNorm(
        norm=group_norm(norm.norm_layer, f"{where}.norm_layer"),
        scale=_cogvideox_conv(norm.conv_y, 1, f"{where}.conv_y", pad_mode="first"),
        shift=_cogvideox_conv(norm.conv_b, 1, f"{where}.conv_b", pad_mode="first"),
    )


def _cogvideox_upsample(block: Any, where: str) -> FramewiseUpsample:
    exactly(block, CogVideoXUpsample3D, where)
    conv = plain_conv(block.conv, 3, f"{where}.conv")
    return FramewiseUpsample(conv=conv, compress_time=bool(block.compress_time))
