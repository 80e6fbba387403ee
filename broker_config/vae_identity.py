"""Which VAE a config describes: a digest of the parts that decide what it makes of latents.

A client that has the pipeline's VAE sends the digest along, a worker compares it with the VAE it loaded. Only numbers
that are part of the trained model count: paths, versions of diffusers and tiling sizes may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

#: Keys of diffusers' autoencoders that decide the numbers; a key that a class lacks is no part of its digest.
IDENTITY_KEYS: Final = (
    "latent_channels",
    "z_dim",
    "base_dim",
    "dim_mult",
    "block_out_channels",
    "decoder_block_out_channels",
    "layers_per_block",
    "decoder_layers_per_block",
    "patch_size",
    "patch_size_t",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "batch_norm_eps",
    "timestep_conditioning",
    "use_post_quant_conv",
)


def config_digest(config: Mapping[str, Any]) -> str:
    """16 hex digits of `config`'s identity; equal for a config and its JSON."""
    known = {key: _plain(config[key]) for key in IDENTITY_KEYS if config.get(key) is not None}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Lists for tuples, floats for whole numbers: what JSON does to a config must not change its digest."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
