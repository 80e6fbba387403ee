"""Tiny random VAEs for the catalogue's entries: the real class, channels and compression, next to no weights.

Statistics are drawn anew, since zeros and ones would hide what is added and multiplied, and a batch norm gets running
statistics for the same reason. Nothing here is ours: diffusers' classes with small numbers.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import diffusers
import torch

#: Its classes have no types.
_DIFFUSERS: Final[Any] = diffusers
#: Entries of ours that ship with weights, or whose weights another test trains.
_NOT_TINY: Final = frozenset({"demo"})


def catalogue() -> dict[str, dict[str, Any]]:
    """Our catalogue as TOML says it."""
    return tomllib.loads((resources.files("broker_config") / "vae_catalog.toml").read_text(encoding="utf-8"))


def _statistics(count: int, *, seed: int) -> dict[str, list[float]]:
    """`latents_mean` and `latents_std` with the digits of the published ones."""
    draw = random.Random(seed)
    return {
        "latents_mean": [round(draw.uniform(-1.5, 1.5), 4) for _ in range(count)],
        "latents_std": [round(draw.uniform(1.1, 3.9), 4) for _ in range(count)],
    }


def _kl(table: Mapping[str, Any], **config: Any) -> Any:
    levels = {4: 3, 8: 4}[table["spatial"]]
    return _DIFFUSERS.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8, 8, 16, 16)[:levels],
        layers_per_block=1,
        latent_channels=table["channels"],
        norm_num_groups=4,
        **config,
    )


def _tiny(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        latent_channels=table["channels"],
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )


def _temporal_decoder(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=table["channels"],
        scaling_factor=0.18215,
    )


def _flux2(table: Mapping[str, Any]) -> Any:
    vae = _DIFFUSERS.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=table["channels"],
        norm_num_groups=4,
    )
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.5)
    return vae


def _hunyuan_image(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=table["channels"],
        block_out_channels=(64, 64, 64, 64, 64, 128),
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=64,
        scaling_factor=0.75289,
    )


def _hunyuan_image_refiner(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLHunyuanImageRefiner(
        latent_channels=table["channels"],
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
        scaling_factor=1.03682,
    )


def _dc(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderDC(
        in_channels=3,
        latent_channels=table["channels"],
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 6,
        decoder_block_types=("ResBlock",) * 6,
        encoder_block_out_channels=(8, 8, 8, 8, 8, 32),
        decoder_block_out_channels=(8, 8, 8, 8, 8, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )


def _qwen(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=table["channels"],
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        input_channels=table.get("pixel_channels", 3),
    )


def _qwen21(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=table["channels"],
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True, True],
    )


def _wan(table: Mapping[str, Any]) -> Any:
    large = table["spatial"] == 16
    return _DIFFUSERS.AutoencoderKLWan(
        base_dim=8,
        z_dim=table["channels"],
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **({"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12} if large else {}),
        **({"scale_factor_spatial": 16, "scale_factor_temporal": 4} if large else {}),
        **_statistics(table["channels"], seed=table["channels"]),
    )


def _hunyuan_video(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLHunyuanVideo(
        latent_channels=table["channels"],
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.476986,
    )


def _hunyuan_video15(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLHunyuanVideo15(
        latent_channels=table["channels"],
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
        scaling_factor=1.03682,
    )


def ltx(table: Mapping[str, Any], *, timestep_conditioning: bool = False) -> Any:
    """LTX-Video's VAE, which from 0.9.1 on is told the timestep it decodes at."""
    vae = _DIFFUSERS.AutoencoderKLLTXVideo(
        latent_channels=table["channels"],
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
    )
    return _with_buffers(vae)


def _ltx2(table: Mapping[str, Any]) -> Any:
    vae = _DIFFUSERS.AutoencoderKLLTX2Video(
        latent_channels=table["channels"],
        block_out_channels=(8, 8, 8, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
    )
    return _with_buffers(vae)


def _with_buffers(vae: Any) -> Any:
    vae.latents_mean.uniform_(-1.5, 1.5)
    vae.latents_std.uniform_(1.1, 3.9)
    return vae


def _cogvideox(table: Mapping[str, Any], *, scaling_factor: float) -> Any:
    return _DIFFUSERS.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=table["channels"],
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    )


def _mochi(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLMochi(
        latent_channels=table["channels"],
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.9,
    )


def _allegro(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=table["channels"],
        norm_num_groups=4,
        sample_size=128,  # tiles overlap by 120 pixels
    )


def _magvit(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLMagvit(
        block_out_channels=[8, 8, 8, 8], latent_channels=table["channels"], layers_per_block=1, norm_num_groups=4
    )


def _cosmos(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLCosmos(
        latent_channels=table["channels"],
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        **_statistics(table["channels"] * 16, seed=1),
    )


def _minimax(table: Mapping[str, Any]) -> Any:
    return _DIFFUSERS.AutoencoderKLMiniMaxH3(
        latent_channels=table["channels"],
        block_out_channels=(8, 8, 8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        decoder_num_layers=1,
        decoder_num_attention_heads=1,
        decoder_attention_head_dim=16,
        decoder_num_register_tokens=1,
        decoder_ffn_mult=1,
        **_statistics(table["channels"], seed=3),
    )


_OWN: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "playground": lambda table: _kl(table, scaling_factor=0.5, **_statistics(4, seed=2)),
    "sd-x4-upscaler": lambda table: _kl(table, scaling_factor=0.08333),
    "kolors": lambda table: _kl(table, scaling_factor=0.13025),
    "sdxl": lambda table: _kl(table, scaling_factor=0.13025),
    "sd3": lambda table: _kl(
        table, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    ),
    "glm-image": lambda table: _kl(table, **_statistics(16, seed=4)),
    "cogview3": lambda table: _kl(table, scaling_factor=1.0),
    "cogview4": lambda table: _kl(table, scaling_factor=1.0),
    "kandinsky5-image": lambda table: _kl(table, scaling_factor=0.3611),
    "cogvideox-2b": lambda table: _cogvideox(table, scaling_factor=1.15258426),
}

_SHIFTED: Final = ("flux", "chroma", "bria", "longcat-image", "ovis-image", "lumina2", "hidream", "z-image", "prx")

_CLASSES: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "AutoencoderKL": lambda table: _kl(table, scaling_factor=0.18215),
    "AutoencoderTiny": _tiny,
    "AutoencoderKLTemporalDecoder": _temporal_decoder,
    "AutoencoderKLFlux2": _flux2,
    "AutoencoderKLHunyuanImage": _hunyuan_image,
    "AutoencoderKLHunyuanImageRefiner": _hunyuan_image_refiner,
    "AutoencoderDC": _dc,
    "AutoencoderKLQwenImage": _qwen,
    "AutoencoderKLQwenImage21": _qwen21,
    "AutoencoderKLWan": _wan,
    "AutoencoderKLHunyuanVideo": _hunyuan_video,
    "AutoencoderKLHunyuanVideo15": _hunyuan_video15,
    "AutoencoderKLLTXVideo": ltx,
    "AutoencoderKLLTX2Video": _ltx2,
    "AutoencoderKLCogVideoX": lambda table: _cogvideox(table, scaling_factor=0.7),
    "AutoencoderKLMochi": _mochi,
    "AutoencoderKLAllegro": _allegro,
    "AutoencoderKLMagvit": _magvit,
    "AutoencoderKLCosmos": _cosmos,
    "AutoencoderKLMiniMaxH3": _minimax,
}


def make(name: str, table: Mapping[str, Any]) -> Any:
    """A tiny VAE for the entry `name`; the same one for the same entry."""
    torch.manual_seed(sum(name.encode()))
    if name in _SHIFTED:
        vae = _kl(table, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    else:
        vae = _OWN.get(name, _CLASSES[table["vae_class"]])(table)
    return vae.eval()


def write_family_catalog(folder: Path, names: Iterable[str] | None = None, *, suffix: str = "") -> Path:
    """Saves tiny VAEs under `folder` and returns a catalogue file with our entries, the weights theirs.

    Args:
        folder: where to.
        names: entries; None: all of ours.
        suffix: what the file's name ends in.
    """
    lines = []
    for name, table in catalogue().items():
        if name in _NOT_TINY or (names is not None and name not in set(names)):
            continue
        make(name, table).save_pretrained(folder / name)
        own = {key: value for key, value in table.items() if key not in ("subfolder", "revision", "source")}
        own |= {"weights": str(folder / name)}
        lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in own.items()), ""]
    path = folder / f"families{suffix}.toml"
    path.write_text("\n".join(lines))
    return path


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub("'", '"', repr(value))
