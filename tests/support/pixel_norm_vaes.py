"""Random VAEs whose norms are per pixel, small but with the real ones' structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)


def wan(**config: Any) -> Any:
    """An AutoencoderKLWan as of Wan 2.1."""
    autoencoder: Any = AutoencoderKLWan
    return autoencoder(**{"base_dim": 8, "z_dim": 4, "num_res_blocks": 1, **config})


def wan22() -> Any:
    """One as of Wan 2.2: other widths in the decoder, sums around its up blocks, pixels in patches."""
    return wan(
        decoder_base_dim=12, is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16
    )


def qwen_image() -> Any:
    """An AutoencoderKLQwenImage."""
    autoencoder: Any = AutoencoderKLQwenImage
    return autoencoder(base_dim=8, z_dim=4, num_res_blocks=1)


def hunyuan_video15() -> Any:
    """An AutoencoderKLHunyuanVideo15."""
    autoencoder: Any = AutoencoderKLHunyuanVideo15
    return autoencoder(latent_channels=4, block_out_channels=(8, 16, 16, 32, 32), layers_per_block=1)


def ltx(**config: Any) -> Any:
    """An AutoencoderKLLTXVideo as of LTX-Video 0.9.0."""
    autoencoder: Any = AutoencoderKLLTXVideo
    small = {
        "latent_channels": 8,
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_block_out_channels": (8, 16, 32, 32),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    }
    return autoencoder(**{**small, **config})


def ltx095(**config: Any) -> Any:
    """One as of LTX-Video 0.9.5: conditioned on a timestep, sums around its upsamples."""
    later = {
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1, 1, 2, 1),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (False,) * 4,
        "upsample_residual": (True,) * 3,
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
    }
    return ltx(**{**later, **config})


def ltx2(**config: Any) -> Any:
    """An AutoencoderKLLTX2Video: its edges are reflected."""
    autoencoder: Any = AutoencoderKLLTX2Video
    small = {
        "latent_channels": 8,
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1, 1, 1, 1),
    }
    return autoencoder(**{**small, **config})


#: By what they stand for.
PIXEL_NORM_FAMILIES: Mapping[str, Callable[[], Any]] = {
    "wan": wan,
    "wan22": wan22,
    "qwen_image": qwen_image,
    "hunyuan_video15": hunyuan_video15,
    "ltx": ltx,
    "ltx_causal": lambda: ltx(decoder_causal=True),
    "ltx095": ltx095,
    "ltx2": lambda: ltx2(decoder_causal=False),
    "ltx2_causal": ltx2,
}


def pixel_norm_family(name: str) -> Any:
    """One of `PIXEL_NORM_FAMILIES`, always with the same weights; norms scale, as trained ones do."""
    torch.manual_seed(sorted(PIXEL_NORM_FAMILIES).index(name))
    vae = PIXEL_NORM_FAMILIES[name]().eval()
    for parameter_name, parameter in vae.named_parameters():
        if parameter_name.endswith("gamma"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return vae


def latents_of(vae: Any, frames: int, height: int, width: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random latents of a VAE's channels and dtype."""
    channels = vae.config.get("z_dim") or vae.config.latent_channels
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, frames, height, width, generator=generator).to(vae.dtype)


def timestep_of(vae: Any, *, batch: int = 1) -> dict[str, Any]:
    """The keyword a conditioned VAE's decode takes besides; nothing for the others."""
    if not vae.config.get("timestep_conditioning", False):
        return {}
    return {"temb": torch.linspace(0.05, 0.1, batch).to(vae.dtype)}
