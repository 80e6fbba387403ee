"""Clips frame by frame: VAEs whose decoder is causal in time hand out each group of frames as soon as it is there.

diffusers' own `decode` keeps every frame and appends each group to all before it, so its memory grows with the clip
and its copies with the square of it. The steps are the same, in the same order and on the same state; so are the bits.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

#: Classes whose decode is this loop, of diffusers 0.42.
_STREAMED: Final = frozenset({"AutoencoderKLWan"})


def can_stream(vae: Any) -> bool:
    """Whether `stream_frames` knows this VAE, as it is set up: tiles are decoded over the whole clip."""
    return type(vae).__name__ in _STREAMED and not vae.use_tiling


def stream_frames(vae: Any, latents: torch.Tensor) -> Generator[torch.Tensor, None, None]:
    """What `vae.decode(latents)` returns, in groups of frames.

    While this runs nobody else may use the VAE: it keeps what the next frames need on itself.

    Args:
        vae: `can_stream` must know it.
        latents: (1, C, f, h, w), as `vae.decode` takes them.

    Yields:
        (1, 3, n, H, W): first one frame, then four at a time.

    Source: models/autoencoders/autoencoder_kl_wan.py `AutoencoderKLWan._decode`.
    """
    vae.clear_cache()
    try:
        inputs = vae.post_quant_conv(latents)
        for frame in range(latents.shape[2]):
            vae._conv_idx = [0]
            options = {"first_chunk": True} if frame == 0 else {}
            # 1, C, f, h, w → 1, C, 1, h, w
            part = inputs[:, :, frame : frame + 1]
            decoded = vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **options)
            if vae.config.patch_size is not None:
                decoded = unpatchify(decoded, patch_size=vae.config.patch_size)  # type: ignore[no-untyped-call]
            yield torch.clamp(decoded, min=-1.0, max=1.0)
    finally:
        vae.clear_cache()
