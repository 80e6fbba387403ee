"""LTX-Video and LTX-2: no attention, so rows go through from the latents to the picture.

Their decoders look ahead unless they are set up as causal; then all frames of a clip go together. A decoder that is
conditioned on a timestep scales and shifts each channel by it. One that mixes noise into its activations is refused:
the noise comes from torch's own generator, in the order of whole activations.

Sources: diffusers autoencoder_kl_ltx.py `LTXVideoDecoder3d`, autoencoder_kl_ltx2.py `LTX2VideoDecoder3d`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from diffusers.models.autoencoders import autoencoder_kl_ltx, autoencoder_kl_ltx2
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings
from diffusers.models.normalization import RMSNorm
from torch import nn

from worker.lowmem_decode.pixel_norm.checks import exactly, require, sized
from worker.lowmem_decode.pixel_norm.kernels import Conv3x3x3
from worker.lowmem_decode.pixel_norm.norms import Modulated, Norm, OwnDtypeNorm, RootMeanSquareNorm
from worker.lowmem_decode.pixel_norm.spreads import Shuffle
from worker.lowmem_decode.pixel_norm.steps import Added, Conv, Program, Step
from worker.lowmem_decode.pixel_norm.strips import Edge


def read_ltx(vae: Any, temb: torch.Tensor | None) -> Program:
    """The steps of an AutoencoderKLLTXVideo or AutoencoderKLLTX2Video."""
    first = type(vae) is autoencoder_kl_ltx.AutoencoderKLLTXVideo
    reader = _Reader(vae, autoencoder_kl_ltx, "LTX", temb) if first else _Reader(vae, autoencoder_kl_ltx2, "LTX2", temb)
    return reader.read()


class _Reader:
    """Reads one decoder."""

    def __init__(self, vae: Any, module: ModuleType, prefix: str, temb: torch.Tensor | None) -> None:
        self._module = module
        self._prefix = prefix
        self._decoder = self._exactly(vae.decoder, "VideoDecoder3d", "decoder")
        conv = self._decoder.conv_in
        self._causal = bool(self._decoder.is_causal if prefix == "LTX2" else conv.is_causal)
        self._edge: Edge = "reflect" if conv.conv.padding_mode == "reflect" else "zeros"
        self._embedded: list[Any] = []
        scale = self._decoder.timestep_scale_multiplier
        require((scale is None) == (temb is None), "it has a timestep scale, but no timestep")
        self._temb = temb if scale is None or temb is None else temb * scale
        self._embedded.append(scale)

    def _exactly(self, module: Any, name: str, where: str) -> Any:
        return exactly(module, getattr(self._module, self._prefix + name), where)

    def read(self) -> Program:
        decoder = self._decoder
        steps: list[Step] = [self._conv(decoder.conv_in, "decoder.conv_in")]
        middle = self._exactly(decoder.mid_block, "VideoMidBlock3d", "decoder.mid_block")
        steps += self._resnets(middle, "decoder.mid_block")
        for number, block in enumerate(decoder.up_blocks):
            where = f"decoder.up_blocks.{number}"
            self._exactly(block, "VideoUpBlock3d", where)
            if block.conv_in is not None:
                # it takes the timestep itself, not what the block makes of it
                require(block.time_embedder is None, f"{where}.conv_in is conditioned on a timestep")
                steps.append(self._resnet(block.conv_in, None, f"{where}.conv_in"))
            steps += [self._upsample(each, f"{where}.upsamplers") for each in block.upsamplers or ()]
            steps += self._resnets(block, where)
        exactly(decoder.conv_act, nn.SiLU, "decoder.conv_act")
        norm = self._norm(decoder.norm_out, "decoder.norm_out")
        if decoder.time_embedder is not None:
            embedded = self._embedding(decoder.time_embedder, "decoder.time_embedder")
            shift, scale = (embedded.view(2, -1) + decoder.scale_shift_table).unbind()
            norm = Modulated(norm=norm, scale=scale, shift=shift)
            self._embedded.append(decoder.scale_shift_table)
        steps.append(self._conv(decoder.conv_out, "decoder.conv_out", norm=norm))
        weight = decoder.conv_in.conv.weight
        return Program(
            before=None,
            segments=(tuple(steps),),
            attentions=(),
            patches=Shuffle(
                factor=int(decoder.patch_size),
                frames=int(decoder.patch_size_t),
                order="channel first, columns first",
                drops=False,
            ),
            clamps=False,
            causal=self._causal,
            frames_per_call=None,
            dtype=weight.dtype,
            device=weight.device,
            latent_channels=int(decoder.conv_in.conv.in_channels),
            read=tuple(self._embedded),
        )

    def _resnets(self, block: Any, where: str) -> list[Step]:
        embedded = None
        if block.time_embedder is not None:
            embedded = self._embedding(block.time_embedder, f"{where}.time_embedder")
        return [self._resnet(resnet, embedded, f"{where}.resnets") for resnet in block.resnets]

    def _embedding(self, embedder: Any, where: str) -> torch.Tensor:
        """What a block makes of the timestep: one number or more for each channel."""
        exactly(embedder, PixArtAlphaCombinedTimestepSizeEmbeddings, where)
        assert self._temb is not None
        self._embedded.append(embedder)
        with torch.inference_mode():
            found: torch.Tensor = embedder(
                timestep=self._temb.flatten(),
                resolution=None,
                aspect_ratio=None,
                batch_size=1,
                hidden_dtype=self._decoder.conv_in.conv.weight.dtype,
            )
        return found.flatten()

    def _conv(self, conv: Any, where: str, *, norm: Norm | None = None, spread: Shuffle | None = None) -> Conv:
        self._exactly(conv, "VideoCausalConv3d", where)
        exactly(conv.conv, nn.Conv3d, where)
        sized(conv.conv, (3, 3, 3), (0, 1, 1), where, mode=self._edge)
        require(tuple(conv.kernel_size) == (3, 3, 3), f"{where} is padded in an unknown way")
        if self._prefix == "LTX":
            require(conv.is_causal == self._causal, f"{where} differs from others in whether it looks ahead")
        return Conv(
            kernel=Conv3x3x3(conv.conv),
            norm=norm,
            spread=spread,
            edge=self._edge,
            frames_edge="replicate",
            causal=self._causal,
        )

    def _norm(self, norm: Any, where: str) -> Norm:
        if self._prefix == "LTX":
            exactly(norm, RMSNorm, where)
            require(norm.weight is None and norm.bias is None, f"{where} has a weight")
            return RootMeanSquareNorm(eps=float(norm.eps))
        exactly(norm, autoencoder_kl_ltx2.PerChannelRMSNorm, where)
        require(norm.channel_dim == 1, f"{where} is over another axis")
        return OwnDtypeNorm(eps=float(norm.eps))

    def _resnet(self, block: Any, embedded: torch.Tensor | None, where: str) -> Added:
        self._exactly(block, "VideoResnetBlock3d", where)
        exactly(block.nonlinearity, nn.SiLU, f"{where}.nonlinearity")
        noisy = block.per_channel_scale1 is not None or block.per_channel_scale2 is not None
        require(not noisy, f"{where} mixes noise into its activations")
        norms = [self._norm(norm, f"{where}.norm") for norm in (block.norm1, block.norm2)]
        table = block.scale_shift_table
        require((table is None) == (embedded is None), f"{where} takes a timestep where the block has none")
        if embedded is not None:
            shift1, scale1, shift2, scale2 = (embedded.view(4, -1) + table).unbind()
            norms = [
                Modulated(norm=norm, scale=scale, shift=shift)
                for norm, scale, shift in zip(norms, (scale1, scale2), (shift1, shift2), strict=True)
            ]
            self._embedded.append(table)
        convs = [
            self._conv(conv, f"{where}.conv", norm=norm)
            for conv, norm in zip((block.conv1, block.conv2), norms, strict=True)
        ]
        return Added(steps=tuple(convs), norm=self._layer_norm(block, where), conv=self._shortcut(block, where))

    def _layer_norm(self, block: Any, where: str) -> Any | None:
        return None if block.norm3 is None else exactly(block.norm3, nn.LayerNorm, f"{where}.norm3")

    def _shortcut(self, block: Any, where: str) -> Any | None:
        if block.conv_shortcut is None:
            return None
        conv = block.conv_shortcut
        if self._prefix == "LTX":
            conv = self._exactly(conv, "VideoCausalConv3d", f"{where}.conv_shortcut").conv
        exactly(conv, nn.Conv3d, f"{where}.conv_shortcut")
        sized(conv, (1, 1, 1), (0, 0, 0), f"{where}.conv_shortcut")
        return conv

    def _upsample(self, block: Any, where: str) -> Step:
        self._exactly(block, "VideoUpsampler3d", where)
        frames, rows, columns = (int(each) for each in block.stride)
        require(rows == columns, f"{where} stretches its frames")
        conv = self._conv(block.conv, f"{where}.conv", spread=Shuffle(factor=rows, frames=frames))
        if not block.residual:
            return conv
        copies = frames * rows * columns // int(block.upscale_factor)
        return Added(steps=(conv,), spread=Shuffle(factor=rows, frames=frames, copies=copies))
