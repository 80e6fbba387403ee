"""The VAEs that `latentq bench` measures: of the real architectures, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import diffusers
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A VAE as far as time and memory depend on it."""

    kind: str
    #: As in the config.json of its repository, where that is not the default of the class. The sample size is what
    #: diffusers' tiles are cut to.
    config: Mapping[str, Any] = field(default_factory=dict)
    #: Pixels per latent pixel, in each direction.
    spatial: int = 8
    #: Frames per latent frame after the first; None: a VAE of pictures.
    temporal: int | None = None


_KL: Final[Mapping[str, Any]] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "sd": Architecture(kind="AutoencoderKL", config={**_KL, "latent_channels": 4, "sample_size": 512}),
    "sdxl": Architecture(kind="AutoencoderKL", config={**_KL, "latent_channels": 4, "sample_size": 1024}),
    "flux": Architecture(
        kind="AutoencoderKL",
        config={
            **_KL,
            "latent_channels": 16,
            "sample_size": 1024,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "qwen-image": Architecture(kind="AutoencoderKLQwenImage", temporal=4),
    "wan": Architecture(kind="AutoencoderKLWan", temporal=4),
    "hunyuan-video": Architecture(kind="AutoencoderKLHunyuanVideo", temporal=4),
    "hunyuan-video-1.5": Architecture(kind="AutoencoderKLHunyuanVideo15", spatial=16, temporal=4),
    "ltx": Architecture(kind="AutoencoderKLLTXVideo", spatial=32, temporal=8),
    "mochi": Architecture(kind="AutoencoderKLMochi", temporal=6),
    "cogvideox": Architecture(
        kind="AutoencoderKLCogVideoX",
        config={
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "block_out_channels": (128, 256, 256, 512),
            "layers_per_block": 3,
        },
        temporal=4,
    ),
}


def random_vae(name: str, *, device: torch.device, dtype: torch.dtype) -> Any:
    """A VAE of this architecture with random weights; in place of its encoder stands nothing of size."""
    torch.manual_seed(0)
    made = ARCHITECTURES[name]
    vae = getattr(diffusers, made.kind)(**made.config).eval()
    vae.encoder = torch.nn.Identity()  # not deleted: some look through it for caches to clear
    return vae.to(device=device, dtype=dtype)


def latents_of(vae: Any, name: str, *, side: int, frames: int = 1) -> torch.Tensor:
    """Random latents of one square picture or clip: (1, C, h, w), or (1, C, f, h, w) for a VAE of clips."""
    made = ARCHITECTURES[name]
    channels = int(vae.config.z_dim if "z_dim" in vae.config else vae.config.latent_channels)
    in_time = () if made.temporal is None else ((frames - 1) // made.temporal + 1,)
    return torch.randn(1, channels, *in_time, side // made.spatial, side // made.spatial)


def cut_tiles(vae: Any, side: int) -> None:
    """Tiles as diffusers cuts them, but so that there are tiles at all."""
    if hasattr(vae, "tile_sample_min_size"):
        vae.tile_sample_min_size = min(vae.tile_sample_min_size, side // 2)
        vae.tile_latent_min_size = vae.tile_sample_min_size // 8
        return
    tile = min(vae.tile_sample_min_height, side // 2)
    vae.tile_sample_min_height = vae.tile_sample_min_width = tile
    if hasattr(vae, "tile_sample_stride_height"):
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = tile * 3 // 4
    else:
        vae.tile_latent_min_height = vae.tile_latent_min_width = tile // 8
