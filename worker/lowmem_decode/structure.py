"""Reads a diffusers autoencoder into steps, or says why it cannot.

Everything a decode does must be understood, or nothing is run: classes are compared exactly (a subclass, a
parametrised or a quantised layer may do something else), hooks and replaced `forward` methods are refused, and every
parameter of the decoder must have been met on the way.

Sources: diffusers autoencoders/vae.py `Decoder`, unets/unet_2d_blocks.py `UNetMidBlock2D` and `UpDecoderBlock2D`,
resnet.py `ResnetBlock2D`, upsampling.py `Upsample2D`, attention_processor.py `Attention` with `AttnProcessor2_0`,
autoencoders/autoencoder_kl_hunyuanimage.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Final

from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLHunyuanImage
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders import autoencoder_kl_hunyuanimage as hunyuan
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from worker.lowmem_decode.steps import Attention, Entry, Head, Program, Resnet, Step, Upsample


class UnsupportedStructure(ValueError):
    """This module cannot be decoded operator by operator."""


def read(vae: Any) -> Program:
    """The steps of a VAE's decode.

    Raises:
        UnsupportedStructure: something about it is not known; the message says what.
    """
    reader = _READERS.get(type(vae))
    if reader is None:
        raise UnsupportedStructure(f"no low-memory decoder for {type(vae).__name__}")
    for name in ("decode", "_decode", "forward"):
        _require(name not in vars(vae), f"{name} of the VAE was replaced")
    _require(not vae.decoder.training or not _drops(vae.decoder), "the VAE is in training mode and drops activations")
    for name, module in vae.decoder.named_modules():
        _untouched(module, f"decoder.{name}")
    entry, steps, head = reader(vae)
    parameters = list(vae.decoder.parameters())
    first = entry.conv.weight
    _require(
        len(_met(entry, steps, head) & {id(p) for p in parameters}) == len(parameters), "it has further parameters"
    )
    _require(len({(p.dtype, p.device) for p in parameters}) == 1, "its parameters differ in dtype or device")
    _require(first.device.type != "meta", "its weights are not loaded")
    before = entry.before
    channels = int(entry.conv.in_channels if before is None else before.in_channels)
    return Program(
        entry=entry, steps=tuple(steps), head=head, dtype=first.dtype, device=first.device, latent_channels=channels
    )


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedStructure(f"no low-memory decoder: {reason}")


def _exactly(module: Any, kind: type, where: str) -> Any:
    _require(type(module) is kind, f"{where} is a {type(module).__name__}, not a {kind.__name__}")
    return module


def _untouched(module: nn.Module, where: str) -> None:
    _require("forward" not in vars(module), f"forward of {where} was replaced")
    _require(not module._forward_hooks and not module._forward_pre_hooks, f"{where} has hooks")
    plain = all(type(parameter) is nn.Parameter for parameter in module.parameters(recurse=False))
    _require(plain, f"{where} has parameters of a special kind")


def _drops(decoder: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in decoder.modules())


def _conv(conv: Any, size: int, where: str) -> Any:
    _exactly(conv, nn.Conv2d, where)
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    wanted = ((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros")
    _require(found == wanted, f"{where} is not a plain {size}×{size} convolution")
    return conv


def _norm(norm: Any, where: str) -> Any:
    _exactly(norm, nn.GroupNorm, where)
    _require(norm.affine and norm.bias is not None, f"{where} has no weight and bias")
    return norm


# AutoencoderKL and its kin ------------------------------------------------------------------------------


def _read_kl(vae: Any) -> tuple[Entry, list[Step], Head]:
    decoder = _exactly(vae.decoder, Decoder, "decoder")
    before = vae.post_quant_conv
    if before is not None:
        _untouched(_conv(before, 1, "post_quant_conv"), "post_quant_conv")
    steps: list[Step] = []
    middle = _exactly(decoder.mid_block, UNetMidBlock2D, "decoder.mid_block")
    steps.append(_resnet(middle.resnets[0], "decoder.mid_block.resnets.0"))
    for number, (attention, block) in enumerate(zip(middle.attentions, middle.resnets[1:], strict=True)):
        if attention is not None:
            steps.append(_attention(attention, f"decoder.mid_block.attentions.{number}"))
        steps.append(_resnet(block, f"decoder.mid_block.resnets.{number + 1}"))
    for number, up in enumerate(decoder.up_blocks):
        where = f"decoder.up_blocks.{number}"
        _exactly(up, UpDecoderBlock2D, where)
        steps.extend(_resnet(block, f"{where}.resnets") for block in up.resnets)
        steps.extend(_upsample(upsample, f"{where}.upsamplers") for upsample in up.upsamplers or ())
    _exactly(decoder.conv_act, nn.SiLU, "decoder.conv_act")
    head = Head(norm=_norm(decoder.conv_norm_out, "conv_norm_out"), conv=_conv(decoder.conv_out, 3, "conv_out"))
    return Entry(before=before, conv=_conv(decoder.conv_in, 3, "conv_in")), steps, head


def _resnet(block: Any, where: str) -> Resnet:
    _exactly(block, ResnetBlock2D, where)
    _require(block.upsample is None and block.downsample is None, f"{where} resamples")
    # an up block of a decoder says "group", which its forward treats as "default" without an embedding
    plain = block.time_emb_proj is None and block.time_embedding_norm in ("default", "group")
    _require(plain, f"{where} takes an embedding")
    _exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    shortcut = block.conv_shortcut
    return Resnet(
        norm1=_norm(block.norm1, f"{where}.norm1"),
        conv1=_conv(block.conv1, 3, f"{where}.conv1"),
        norm2=_norm(block.norm2, f"{where}.norm2"),
        conv2=_conv(block.conv2, 3, f"{where}.conv2"),
        shortcut=None if shortcut is None else _conv(shortcut, 1, f"{where}.conv_shortcut"),
        scale=float(block.output_scale_factor),
    )


def _attention(block: Any, where: str) -> Attention:
    _exactly(block, DiffusersAttention, where)
    processor = type(block.processor)
    _require(processor in (AttnProcessor, AttnProcessor2_0), f"{where} uses {processor.__name__}")
    extras = (block.spatial_norm, block.norm_q, block.norm_k, getattr(block, "norm_cross", None) or None)
    _require(all(extra is None for extra in extras), f"{where} normalises in an unknown way")
    return Attention(
        norm=None if block.group_norm is None else _norm(block.group_norm, f"{where}.group_norm"),
        query=_exactly(block.to_q, nn.Linear, f"{where}.to_q"),
        key=_exactly(block.to_k, nn.Linear, f"{where}.to_k"),
        value=_exactly(block.to_v, nn.Linear, f"{where}.to_v"),
        out=_exactly(block.to_out[0], nn.Linear, f"{where}.to_out"),
        heads=int(block.heads),
        residual=bool(block.residual_connection),
        scale=float(block.rescale_output_factor),
    )


def _upsample(block: Any, where: str) -> Upsample:
    _exactly(block, Upsample2D, where)
    plain = block.use_conv and not block.use_conv_transpose and block.interpolate and block.norm is None
    _require(plain and block.name == "conv", f"{where} is not a nearest-neighbour upsample with a convolution")
    return Upsample(kind="nearest", conv=_conv(block.conv, 3, f"{where}.conv"))


# AutoencoderKLHunyuanImage ------------------------------------------------------------------------------


def _read_hunyuan_image(vae: Any) -> tuple[Entry, list[Step], Head]:
    decoder = _exactly(vae.decoder, hunyuan.HunyuanImageDecoder2D, "decoder")
    _exactly(decoder.nonlinearity, nn.SiLU, "decoder.nonlinearity")
    middle = _exactly(decoder.mid_block, hunyuan.HunyuanImageMidBlock, "decoder.mid_block")
    steps: list[Step] = [_hunyuan_resnet(middle.resnets[0], "decoder.mid_block.resnets.0")]
    for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
        steps.append(_hunyuan_attention(attention, "decoder.mid_block.attentions"))
        steps.append(_hunyuan_resnet(block, "decoder.mid_block.resnets"))
    for number, block in enumerate(decoder.up_blocks):
        where = f"decoder.up_blocks.{number}"
        if type(block) is hunyuan.HunyuanImageUpsample:
            conv = _conv(block.conv, 3, f"{where}.conv")
            steps.append(Upsample(kind="shuffle", conv=conv, repeats=int(block.repeats)))
        else:
            steps.append(_hunyuan_resnet(block, where))
    entry = Entry(before=None, conv=_conv(decoder.conv_in, 3, "conv_in"), repeats=int(decoder.repeat))
    return entry, steps, Head(norm=_norm(decoder.norm_out, "norm_out"), conv=_conv(decoder.conv_out, 3, "conv_out"))


def _hunyuan_resnet(block: Any, where: str) -> Resnet:
    _exactly(block, hunyuan.HunyuanImageResnetBlock, where)
    _exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
    _require(block.conv_shortcut is None, f"{where} changes its channels")
    return Resnet(
        norm1=_norm(block.norm1, f"{where}.norm1"),
        conv1=_conv(block.conv1, 3, f"{where}.conv1"),
        norm2=_norm(block.norm2, f"{where}.norm2"),
        conv2=_conv(block.conv2, 3, f"{where}.conv2"),
    )


def _hunyuan_attention(block: Any, where: str) -> Attention:
    _exactly(block, hunyuan.HunyuanImageAttentionBlock, where)
    return Attention(
        norm=_norm(block.norm, f"{where}.norm"),
        query=_conv(block.to_q, 1, f"{where}.to_q"),
        key=_conv(block.to_k, 1, f"{where}.to_k"),
        value=_conv(block.to_v, 1, f"{where}.to_v"),
        out=_conv(block.proj, 1, f"{where}.proj"),
        heads=1,
        residual=True,
    )


_READERS: Final[Mapping[type, Callable[[Any], tuple[Entry, list[Step], Head]]]] = {
    AutoencoderKL: _read_kl,
    AutoencoderKLFlux2: _read_kl,
    AutoencoderKLHunyuanImage: _read_hunyuan_image,
}


def _met(entry: Entry, steps: list[Step], head: Head) -> set[int]:
    """Identities of the parameters of the modules the steps refer to."""
    values = [getattr(step, field.name) for step in (entry, *steps, head) for field in fields(step)]
    return {id(parameter) for value in values if isinstance(value, nn.Module) for parameter in value.parameters()}
