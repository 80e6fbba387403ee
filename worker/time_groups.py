"""Which latent frames of a clip a VAE decodes together, where those are not all.

CogVideoX decodes groups of two one after the other. HunyuanVideo decodes tiles of a few latent frames that overlap,
apart, and blends them: diffusers does so by default, since the GroupNorms take their statistics over all frames they
are given, so the tiles are the VAE's own and no compromise. Here each tile's frames go out as soon as the next tile
cannot change them.

Sources: diffusers autoencoder_kl_cogvideox.py `AutoencoderKLCogVideoX._decode`, autoencoder_kl_hunyuan_video.py
`AutoencoderKLHunyuanVideo._temporal_tiled_decode`, `_decode`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


def group_spans(vae: Any, latent_frames: int) -> list[tuple[int, int]]:
    """Latent frames of each of an AutoencoderKLCogVideoX's groups: what is left over goes with the first."""
    size = vae.num_latent_frames_batch_size
    count, rest = max(latent_frames // size, 1), latent_frames % size
    return [
        (size * number + (rest if number else 0), min(size * (number + 1) + rest, latent_frames))
        for number in range(count)
    ]


def is_tiled(vae: Any, latent_frames: int) -> bool:
    """Whether a clip is decoded in tiles, or at once."""
    return bool(
        vae.use_framewise_decoding and latent_frames > vae.tile_sample_min_num_frames // vae.temporal_compression_ratio
    )


def tile_spans(vae: Any, latent_frames: int) -> list[tuple[int, int]]:
    """Latent frames of each tile, from the first to the one behind the last; of a short clip all."""
    if not is_tiled(vae, latent_frames):
        return [(0, latent_frames)]
    ratio = vae.temporal_compression_ratio
    size, step = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
    spans = [(start, min(start + size + 1, latent_frames)) for start in range(0, latent_frames, step)]
    # of a later tile the first latent frame's picture is dropped: nothing is left of one that has no other
    return [(start, end) for start, end in spans if start == 0 or end - start > 1]


def blended_tiles(
    vae: Any, latents: torch.Tensor, decode: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The frames of a clip, tile by tile.

    Args:
        vae: an AutoencoderKLHunyuanVideo.
        latents: (1, C, f, h, w).
        decode: a tile (1, C, n, h, w) to its frames (1, 3, N, H, W), which are changed.

    Yields:
        (1, 3, n, H, W), in order.
    """
    if not is_tiled(vae, latents.shape[2]):
        yield decode(latents)
        return
    step = vae.tile_sample_stride_num_frames
    overlap = vae.tile_sample_min_num_frames - step
    left = (latents.shape[2] - 1) * vae.temporal_compression_ratio + 1
    before: torch.Tensor | None = None
    for start, end in tile_spans(vae, latents.shape[2]):
        frames = decode(latents[:, :, start:end])
        with torch.inference_mode():
            if before is not None:
                frames = vae.blend_t(before, frames[:, :, 1:], overlap)
            before = frames[:, :, -overlap:].clone() if overlap else frames[:, :, :0]
            ready = frames[:, :, : min(left, step + (start == 0))]
        del frames
        left -= ready.shape[2]
        if ready.shape[2]:
            yield ready
