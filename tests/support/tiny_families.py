"""Tiny random VAEs for the catalogue's entries: the real class, channels and compression, next to no weights.

Statistics are drawn anew, since zeros and ones would hide what is added and multiplied, and a batch norm gets running
statistics for the same reason. Nothing here is ours: diffusers' classes with small numbers.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Iterable, Mapping
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


#: Class → config, where it does not depend on the entry beyond channels and compression.
_LEVELS: Final = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
#: Their encoders average the last channels to twice the latent ones.
_HUNYUAN: Final = {"block_out_channels": (32, 32, 32, 32, 64), "layers_per_block": 1}
_WAN: Final = {
    "base_dim": 8,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
_LTX: Final = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1, 1)}
_BLOCKS_2D: Final = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
_CONFIGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "num_encoder_blocks": (1, 1, 1, 1),
        "num_decoder_blocks": (1, 1, 1, 1),
    },
    "AsymmetricAutoencoderKL": {
        **_BLOCKS_2D,
        "down_block_out_channels": (8, 8, 8, 8),
        "up_block_out_channels": (8, 8, 8, 16),
        "norm_num_groups": 4,
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "encoder_layers_per_block": 1,
        "encoder_norm_num_groups": 4,
        "decoder_block_out_channels": (8, 8),
        "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        "decoder_layers_per_block": 1,
        "decoder_norm_num_groups": 4,
    },
    "AutoencoderKLTemporalDecoder": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "scaling_factor": 0.18215,
    },
    "AutoencoderKLFlux2": {**_LEVELS, **_BLOCKS_2D},
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (64, 64, 64, 64, 64, 128),
        "layers_per_block": 1,
        "spatial_compression_ratio": 32,
        "sample_size": 64,
        "scaling_factor": 0.75289,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        **_HUNYUAN,
        "spatial_compression_ratio": 16,
        "temporal_compression_ratio": 4,
        "scaling_factor": 1.03682,
    },
    "AutoencoderDC": {
        "in_channels": 3,
        "attention_head_dim": 8,
        "encoder_block_types": ("ResBlock",) * 6,
        "decoder_block_types": ("ResBlock",) * 6,
        "encoder_block_out_channels": (8, 8, 8, 8, 8, 32),
        "decoder_block_out_channels": (8, 8, 8, 8, 8, 32),
        "encoder_layers_per_block": (1,) * 6,
        "decoder_layers_per_block": (1,) * 6,
        "encoder_qkv_multiscales": ((),) * 6,
        "decoder_qkv_multiscales": ((),) * 6,
        "scaling_factor": 0.41407,
    },
    "AutoencoderKLQwenImage": _WAN,
    "AutoencoderKLQwenImage21": {
        **_WAN,
        "decoder_base_dim": 8,
        "dim_mult": [1, 1, 1, 1, 1],
        "temperal_downsample": [False, True, True, True],
    },
    "AutoencoderKLWan": _WAN,
    "AutoencoderKLHunyuanVideo": {**_LEVELS, "scaling_factor": 0.476986},
    "AutoencoderKLHunyuanVideo15": {
        **_HUNYUAN,
        "spatial_compression_ratio": 16,
        "temporal_compression_ratio": 4,
        "scaling_factor": 1.03682,
    },
    "AutoencoderKLLTXVideo": {
        **_LTX,
        "decoder_block_out_channels": (8, 8, 8, 8),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
    "AutoencoderKLLTX2Video": {
        **_LTX,
        "block_out_channels": (8, 8, 8, 16),
        "decoder_block_out_channels": (8, 16, 32),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
    "AutoencoderKLCogVideoX": {
        **_LEVELS,
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "scaling_factor": 0.7,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "scaling_factor": 0.9,
    },
    "AutoencoderKLAllegro": {**_LEVELS, "sample_size": 128},  # tiles overlap by 120 pixels
    "AutoencoderKLMagvit": {**_LEVELS, "block_out_channels": [8, 8, 8, 8]},
    "AutoencoderKLCosmos": {
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decode_block_out_channels": (8, 8, 8, 8),
        "attention_resolutions": (8,),
        "resolution": 64,
        "num_layers": 1,
    },
    "AutoencoderKLMiniMaxH3": {
        **_LEVELS,
        "block_out_channels": (8, 8, 8, 8, 8, 8),
        "decoder_num_layers": 1,
        "decoder_num_attention_heads": 1,
        "decoder_attention_head_dim": 16,
        "decoder_num_register_tokens": 1,
        "decoder_ffn_mult": 1,
    },
}
#: Classes that call their latent channels z.
_Z: Final = ("AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLWan")


def _config(table: Mapping[str, Any]) -> dict[str, Any]:
    """Config of an entry's class: what is in `_CONFIGS`, and what the entry says."""
    kind, channels = table["vae_class"], table["channels"]
    if kind == "AutoencoderKL":
        levels = {4: 3, 8: 4}[table["spatial"]]
        own: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels,
            "block_out_channels": (8, 8, 16, 16)[:levels],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.18215,
        }
    else:
        own = dict(_CONFIGS[kind])
    own["z_dim" if kind in _Z else "latent_channels"] = channels
    if kind == "AutoencoderKLQwenImage":
        own["input_channels"] = table.get("pixel_channels", 3)
    if kind == "AutoencoderKLWan" and table["spatial"] == 16:
        own |= {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
        own |= {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
    statistics = {"AutoencoderKLWan": (1, channels), "AutoencoderKLCosmos": (16, 1), "AutoencoderKLMiniMaxH3": (1, 3)}
    if kind in statistics:
        times, seed = statistics[kind]
        own |= _statistics(channels * times, seed=seed)
    return own


def _with_statistics(vae: Any) -> Any:
    """Statistics that are buffers."""
    bounds = {
        "bn.running_mean": (-0.5, 0.5),
        "bn.running_var": (0.5, 2.5),
        "latents_mean": (-1.5, 1.5),
        "latents_std": (1.1, 3.9),
    }
    buffers = dict(vae.named_buffers())
    for name, (low, high) in bounds.items():
        if name in buffers:
            buffers[name].uniform_(low, high)
    return vae


def ltx(table: Mapping[str, Any], *, timestep_conditioning: bool = False) -> Any:
    """LTX-Video's VAE, which from 0.9.1 on is told the timestep it decodes at."""
    config = {**_config(table), "timestep_conditioning": timestep_conditioning}
    return _with_statistics(_DIFFUSERS.AutoencoderKLLTXVideo(**config))


_SHIFTED: Final = {"shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
_AS_FLUX: Final = ("flux", "chroma", "bria", "longcat-image", "ovis-image", "lumina2", "hidream", "z-image", "prx")
#: Entry → what of its config its class does not tell.
_OWN: Final[Mapping[str, Mapping[str, Any]]] = {
    "playground": {"scaling_factor": 0.5, **_statistics(4, seed=2)},
    "sd-x4-upscaler": {"scaling_factor": 0.08333},
    "kolors": {"scaling_factor": 0.13025},
    "sdxl": {"scaling_factor": 0.13025, "force_upcast": False},
    "sdxl-original": {"scaling_factor": 0.13025, "force_upcast": True},
    "sd3": {**_SHIFTED, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "glm-image": _statistics(16, seed=4),
    "cogview3": {**_SHIFTED, "scaling_factor": 1.0},
    "cogview4": {**_SHIFTED, "scaling_factor": 1.0},
    "kandinsky5-image": {**_SHIFTED, "scaling_factor": 0.3611},
    "cogvideox-2b": {"scaling_factor": 1.15258426},
    **{name: {**_SHIFTED, "scaling_factor": 0.3611} for name in _AS_FLUX},
}


def make(name: str, table: Mapping[str, Any]) -> Any:
    """A tiny VAE for the entry `name`; the same one for the same entry."""
    torch.manual_seed(sum(name.encode()))
    vae = getattr(_DIFFUSERS, table["vae_class"])(**{**_config(table), **_OWN.get(name, {})})
    return _with_statistics(vae).eval()


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
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in own.items()), ""]  # JSON is TOML here
    path = folder / f"families{suffix}.toml"
    path.write_text("\n".join(lines))
    return path
