"""Tiny random VAEs of the real classes, saved as the real ones are: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo

Factory = Callable[[], Any]


def _image_vae(channels: int, **config: Any) -> Any:
    autoencoder: Any = AutoencoderKL
    return autoencoder(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        **config,
    )


def _hunyuan_video() -> Any:
    autoencoder: Any = AutoencoderKLHunyuanVideo
    return autoencoder(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
    )


#: Catalogue name → (factory, catalogue table).
TINY: Mapping[str, tuple[Factory, Mapping[str, Any]]] = {
    "sd": (
        lambda: _image_vae(4, scaling_factor=0.18215),
        {"vae_class": "AutoencoderKL", "channels": 4, "spatial": 8, "layouts": ["unpacked", "video_2d"]},
    ),
    "sdxl": (
        lambda: _image_vae(4, scaling_factor=0.13025),
        {"vae_class": "AutoencoderKL", "channels": 4, "spatial": 8, "layouts": ["unpacked", "video_2d"]},
    ),
    "flux": (
        lambda: _image_vae(
            16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        ),
        {"vae_class": "AutoencoderKL", "channels": 16, "spatial": 8, "layouts": ["packed", "unpacked"]},
    ),
    "hunyuanvideo": (
        _hunyuan_video,
        {
            "vae_class": "AutoencoderKLHunyuanVideo",
            "channels": 16,
            "spatial": 8,
            "temporal": 4,
            "layouts": ["video"],
            "fps": 24,
        },
    ),
}


def write_tiny_catalog(folder: Path) -> Path:
    """Saves every tiny VAE under `folder` and returns a catalogue file that names them."""
    lines = []
    for number, (name, (factory, table)) in enumerate(TINY.items()):
        torch.manual_seed(number)
        factory().save_pretrained(folder / name)
        lines += [f"[{name}]", f'title = "tiny random {name}"', f'weights = "{folder / name}"']
        for key, value in table.items():
            lines.append(f"{key} = {value!r}".replace("'", '"'))
        lines.append("")
    catalog = folder / "catalog.toml"
    catalog.write_text("\n".join(lines))
    return catalog
