"""Random VAEs of clips whose norms are GroupNorms, small but with the real ones' structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo


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


#: By class, and what is special about them.
CLIP_FAMILIES: Mapping[str, Callable[[], Any]] = {
    "hunyuan_video": hunyuan_video,
    "hunyuan_video_without_attention": lambda: hunyuan_video(mid_block_add_attention=False),
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
