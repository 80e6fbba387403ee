"""Reads a diffusers autoencoder into steps, or says why it cannot.

Everything a decode does must be understood, or nothing is run: classes are compared exactly (a subclass, a
parametrised or a quantised layer may do something else), hooks and replaced `forward` methods are refused, and every
parameter of the decoder must have been met on the way.

Sources: diffusers autoencoders/vae.py `Decoder`, unets/unet_2d_blocks.py `UNetMidBlock2D` and `UpDecoderBlock2D`,
resnet.py `ResnetBlock2D`, upsampling.py `Upsample2D`, attention_processor.py `Attention` with `AttnProcessor2_0`,
autoencoders/autoencoder_kl_hunyuanimage.py. Clips: `clip_structure`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLMochi,
)
from diffusers.models.autoencoders import autoencoder_kl_hunyuanimage as hunyuan
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from worker.lowmem_decode.clip_structure import read_cogvideox, read_hunyuan_video, read_mochi
from worker.lowmem_decode.steps import (
    Attention,
    Entry,
    Head,
    Parts,
    Program,
    Resnet,
    SpatialNorm,
    Step,
    Upsample,
    picture_kernel,
)
from worker.lowmem_decode.structure_checks import (
    UnsupportedStructure,
    drops,
    exactly,
    group_norm,
    plain_conv,
    require,
    self_attention,
    untouched,
)


def read(vae: Any) -> Program:
    """The steps of a VAE's decode.

    Raises:
        UnsupportedStructure: something about it is not known; the message says what.
    """
    reader = _READERS.get(type(vae))
    if reader is None:
        raise UnsupportedStructure(f"no low-memory decoder for {type(vae).__name__}")
    for name in ("decode", "_decode", "forward"):
        require(name not in vars(vae), f"{name} of the VAE was replaced")
    require(not getattr(vae, "use_tiling", False), "the VAE is set to decode in tiles")
    require(not vae.decoder.training or not drops(vae.decoder), "the VAE is in training mode and drops activations")
    for name, module in vae.decoder.named_modules():
        untouched(module, f"decoder.{name}")
    parts = reader(vae)
    parameters = list(vae.decoder.parameters())
    first = parameters[0]
    require(len(_met(parts) & {id(p) for p in parameters}) == len(parameters), "it has further parameters")
    require(len({(p.dtype, p.device) for p in parameters}) == 1, "its parameters differ in dtype or device")
    require(first.device.type != "meta", "its weights are not loaded")
    return Program(parts=parts, dtype=first.dtype, device=first.device, latent_channels=parts.entry.latent_channels)


# AutoencoderKL and its kin ------------------------------------------------------------------------------


def _read_kl(vae: Any) -> Parts:
    decoder = exactly(vae.decoder, Decoder, "decoder")
    before = vae.post_quant_conv
    if before is not None:
        untouched(plain_conv(before, 1, "post_quant_conv"), "post_quant_conv")
    steps: list[Step] = []
    middle = exactly(decoder.mid_block, UNetMidBlock2D, "decoder.mid_block")
    steps.append(_resnet(middle.resnets[0], "decoder.mid_block.resnets.0"))
    for number, (attention, block) in enumerate(zip(middle.attentions, middle.resnets[1:], strict=True)):
        if attention is not None:
            steps.append(self_attention(attention, f"decoder.mid_block.attentions.{number}"))
        steps.append(_resnet(block, f"decoder.mid_block.resnets.{number + 1}"))
    for number, up in enumerate(decoder.up_blocks):
        where = f"decoder.up_blocks.{number}"
        exactly(up, UpDecoderBlock2D, where)
        steps.extend(_resnet(block, f"{where}.resnets") for block in up.resnets)
        steps.extend(_upsample(upsample, f"{where}.upsamplers") for upsample in up.upsamplers or ())
    exactly(decoder.conv_act, nn.SiLU, "decoder.conv_act")
    head = Head(
        norm=group_norm(decoder.conv_norm_out, "conv_norm_out"), conv=plain_conv(decoder.conv_out, 3, "conv_out")
    )
    return Parts(
        entry=Entry(before=before, conv=plain_conv(decoder.conv_in, 3, "conv_in")),
        steps=tuple(steps),
        head=head,
        kernel=picture_kernel,
    )


def _resnet(block: Any, where: str) -> Resnet:
    exactly(block, ResnetBlock2D, where)
    require(block.upsample is None and block.downsample is None, f"{where} resamples")
    # an up block of a decoder says "group", which its forward treats as "default" without an embedding
    plain = block.time_emb_proj is None and block.time_embedding_norm in ("default", "group")
    require(plain, f"{where} takes an embedding")
    exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    shortcut = block.conv_shortcut
    return Resnet(
        norm1=group_norm(block.norm1, f"{where}.norm1"),
        conv1=plain_conv(block.conv1, 3, f"{where}.conv1"),
        norm2=group_norm(block.norm2, f"{where}.norm2"),
        conv2=plain_conv(block.conv2, 3, f"{where}.conv2"),
        shortcut=None if shortcut is None else plain_conv(shortcut, 1, f"{where}.conv_shortcut"),
        scale=float(block.output_scale_factor),
    )


def _upsample(block: Any, where: str) -> Upsample:
    exactly(block, Upsample2D, where)
    plain = block.use_conv and not block.use_conv_transpose and block.interpolate and block.norm is None
    require(plain and block.name == "conv", f"{where} is not a nearest-neighbour upsample with a convolution")
    return Upsample(kind="nearest", conv=plain_conv(block.conv, 3, f"{where}.conv"))


# AutoencoderKLHunyuanImage ------------------------------------------------------------------------------


def _read_hunyuan_image(vae: Any) -> Parts:
    decoder = exactly(vae.decoder, hunyuan.HunyuanImageDecoder2D, "decoder")
    exactly(decoder.nonlinearity, nn.SiLU, "decoder.nonlinearity")
    middle = exactly(decoder.mid_block, hunyuan.HunyuanImageMidBlock, "decoder.mid_block")
    steps: list[Step] = [_hunyuan_resnet(middle.resnets[0], "decoder.mid_block.resnets.0")]
    for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
        steps.append(_hunyuan_attention(attention, "decoder.mid_block.attentions"))
        steps.append(_hunyuan_resnet(block, "decoder.mid_block.resnets"))
    for number, block in enumerate(decoder.up_blocks):
        where = f"decoder.up_blocks.{number}"
        if type(block) is hunyuan.HunyuanImageUpsample:
            conv = plain_conv(block.conv, 3, f"{where}.conv")
            steps.append(Upsample(kind="shuffle", conv=conv, repeats=int(block.repeats)))
        else:
            steps.append(_hunyuan_resnet(block, where))
    entry = Entry(before=None, conv=plain_conv(decoder.conv_in, 3, "conv_in"), repeats=int(decoder.repeat))
    head = Head(norm=group_norm(decoder.norm_out, "norm_out"), conv=plain_conv(decoder.conv_out, 3, "conv_out"))
    return Parts(entry=entry, steps=tuple(steps), head=head, kernel=picture_kernel)


def _hunyuan_resnet(block: Any, where: str) -> Resnet:
    exactly(block, hunyuan.HunyuanImageResnetBlock, where)
    exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    require(block.conv_shortcut is None, f"{where} changes its channels")
    return Resnet(
        norm1=group_norm(block.norm1, f"{where}.norm1"),
        conv1=plain_conv(block.conv1, 3, f"{where}.conv1"),
        norm2=group_norm(block.norm2, f"{where}.norm2"),
        conv2=plain_conv(block.conv2, 3, f"{where}.conv2"),
    )


def _hunyuan_attention(block: Any, where: str) -> Attention:
    exactly(block, hunyuan.HunyuanImageAttentionBlock, where)
    return Attention(
        norm=group_norm(block.norm, f"{where}.norm"),
        query=plain_conv(block.to_q, 1, f"{where}.to_q"),
        key=plain_conv(block.to_k, 1, f"{where}.to_k"),
        value=plain_conv(block.to_v, 1, f"{where}.to_v"),
        out=plain_conv(block.proj, 1, f"{where}.proj"),
        heads=1,
        residual=True,
    )


_READERS: Final[Mapping[type, Callable[[Any], Parts]]] = {
    AutoencoderKL: _read_kl,
    AutoencoderKLFlux2: _read_kl,
    AutoencoderKLHunyuanImage: _read_hunyuan_image,
    AutoencoderKLCogVideoX: read_cogvideox,
    AutoencoderKLHunyuanVideo: read_hunyuan_video,
    AutoencoderKLMochi: read_mochi,
}


def _met(parts: Parts) -> set[int]:
    """Identities of the parameters of the modules the steps refer to."""
    every = (parts.entry, *parts.steps, parts.head)
    values = [getattr(step, field.name) for step in every for field in fields(step)]
    values += [part for norm in values if isinstance(norm, SpatialNorm) for part in (norm.norm, norm.scale, norm.shift)]
    return {id(parameter) for value in values if isinstance(value, nn.Module) for parameter in value.parameters()}
