"""Random VAEs of clips whose norms are GroupNorms, small but with the real ones' structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLMochi


def hunyuan_video(**config: Any) -> Any:
    """An AutoencoderKLHunyuanVideo; the widest activation is the last upsample's, as in the real one."""
    autoencoder: Any = AutoencoderKLHunyuanVideo
    defaults = {
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return autoencoder(**{**defaults, **config})


def mochi(**config: Any) -> Any:
    """An AutoencoderKLMochi; diffusers fixes 32 groups for its norms."""
    autoencoder: Any = AutoencoderKLMochi
    defaults = {
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 64, 64),
        "layers_per_block": (1, 1, 1, 1, 1),
        "latent_channels": 4,
    }
    return autoencoder(**{**defaults, **config})


def cogvideox(**config: Any) -> Any:
    """An AutoencoderKLCogVideoX; the widest activation is the last upsample's, as in the real one."""
    autoencoder: Any = AutoencoderKLCogVideoX
    defaults = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (8, 16, 16, 32),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return autoencoder(**{**defaults, **config})


#: By class, and what is special about them.
CLIP_FAMILIES: Mapping[str, Callable[[], Any]] = {
    "hunyuan_video": hunyuan_video,
    "hunyuan_video_without_attention": lambda: hunyuan_video(mid_block_add_attention=False),
    "mochi": mochi,
    "cogvideox": cogvideox,
}


def clip_family(name: str) -> Any:
    """One of `CLIP_FAMILIES`, always with the same weights; norms scale and shift, as trained ones do."""
    torch.manual_seed(sorted(CLIP_FAMILIES).index(name))
    vae = CLIP_FAMILIES[name]().eval()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, mean=1.0, std=0.2)
            torch.nn.init.normal_(module.bias, std=0.2)
    return vae
