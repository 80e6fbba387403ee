"""Random VAEs of the classes the low-memory decoder takes, small but with the real ones' structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLHunyuanImage


def kl(kind: Any = AutoencoderKL, **config: Any) -> Any:
    """An AutoencoderKL of four levels; the widest activation is the last upsample's, as in the real ones."""
    defaults = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 8,
    }
    return kind(**{**defaults, **config})


def hunyuan_image() -> Any:
    """An AutoencoderKLHunyuanImage of four levels."""
    autoencoder: Any = AutoencoderKLHunyuanImage
    return autoencoder(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        spatial_compression_ratio=8,
        sample_size=64,
    )


#: By what they stand for. SD and SDXL differ in their weights alone.
FAMILIES: Mapping[str, Callable[[], Any]] = {
    "sd": kl,
    "flux": lambda: kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
    "flux2": lambda: kl(AutoencoderKLFlux2, latent_channels=32, sample_size=64),
    "without_attention": lambda: kl(mid_block_add_attention=False, layers_per_block=1),
    "one_level": lambda: kl(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(16,)
    ),
    "narrow_end": lambda: kl(block_out_channels=(8, 8, 32, 16)),
    "hunyuan_image": hunyuan_image,
}


def family(name: str) -> Any:
    """One of `FAMILIES`, always with the same weights; norms scale and shift, as trained ones do."""
    torch.manual_seed(sorted(FAMILIES).index(name))
    vae = FAMILIES[name]().eval()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
    return vae
