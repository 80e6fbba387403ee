"""Clips frame by frame: VAEs that decode a clip in groups of frames hand out each group as soon as it is there.

diffusers' own `decode` keeps every frame, and some append each group to all before it, so their memory grows with the
clip and their copies with the square of it. The steps here are the same, in the same order and on the same state; so
are the bits. The low-memory decoder hands out groups of its own. Why the other video VAEs are not here:
docs/decode-speed.md.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, Final

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from worker.lowmem_decode import LowMemoryVae
from worker.time_groups import blended_tiles, group_spans

Groups = Generator[torch.Tensor, None, None]


def can_stream(vae: Any) -> bool:
    """Whether `stream_frames` knows this VAE, as it is set up: tiles of a frame are decoded over the whole clip."""
    if isinstance(vae, LowMemoryVae):
        return vae.can_stream
    return type(vae).__name__ in _STREAMS and not vae.use_tiling


def stream_frames(vae: Any, latents: torch.Tensor) -> Groups:
    """What `vae.decode(latents)` returns, in groups of frames.

    While this runs nobody else may use the VAE: some keep what the next frames need on themselves.

    Args:
        vae: `can_stream` must know it.
        latents: (1, C, f, h, w), as `vae.decode` takes them.

    Yields:
        (1, 3, n, H, W), in order.
    """
    if isinstance(vae, LowMemoryVae):
        return vae.stream(latents)
    return _STREAMS[type(vae).__name__](vae, latents)


def frames_at_once(vae: Any, frames: int) -> int:
    """Frames of a clip of so many that are activations at the same time, at most.

    Args:
        vae: any.
        frames: of the clip.
    """
    if type(vae).__name__ == "AutoencoderKLHunyuanVideo" and vae.use_framewise_decoding:
        return min(frames, int(vae.tile_sample_min_num_frames) + 1)  # of a tile, before it is cut
    if type(vae).__name__ == "AutoencoderKLCogVideoX":
        return min(frames, int(vae.num_sample_frames_batch_size) + 1)  # of a group, a left over frame with it
    if type(vae).__name__ == "AutoencoderKLWan":
        return min(frames, int(vae.config.scale_factor_temporal))  # of a latent frame
    if type(vae).__name__ == "AutoencoderKLMagvit":
        return min(frames, int(vae.num_latent_frames_batch_size * vae.temporal_compression_ratio))  # of a group
    return frames


def _wan(vae: Any, latents: torch.Tensor) -> Groups:
    """One latent frame after the other, convolutions remembering the two before.

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


def _cogvideox(vae: Any, latents: torch.Tensor) -> Groups:
    """Two latent frames at a time, what is left over with the first two; the cache goes from group to group.

    Source: models/autoencoders/autoencoder_kl_cogvideox.py `AutoencoderKLCogVideoX._decode`.
    """
    cache = None
    for start, end in group_spans(vae, latents.shape[2]):
        part = latents[:, :, start:end]
        if vae.post_quant_conv is not None:
            part = vae.post_quant_conv(part)
        decoded, cache = vae.decoder(part, conv_cache=cache)
        yield decoded


def _magvit(vae: Any, latents: torch.Tensor) -> Groups:
    """The first latent frame, then groups; convolutions remember what the next group needs.

    Source: models/autoencoders/autoencoder_kl_magvit.py `AutoencoderKLMagvit._decode`, `decode`.
    """
    vae._clear_conv_cache()
    try:
        inputs = vae.post_quant_conv(latents)
        yield vae.decoder(inputs[:, :, :1])
        size = vae.num_latent_frames_batch_size
        for start in range(1, latents.shape[2], size):
            yield vae.decoder(inputs[:, :, start : start + size])
    finally:
        vae._clear_conv_cache()


def _hunyuan_video(vae: Any, latents: torch.Tensor) -> Groups:
    """Tiles of a few latent frames, blended.

    Source: models/autoencoders/autoencoder_kl_hunyuan_video.py `AutoencoderKLHunyuanVideo._decode`.
    """
    yield from blended_tiles(vae, latents, lambda tile: vae.decoder(vae.post_quant_conv(tile)))


#: Classes whose decode is such a loop, of diffusers 0.42.
_STREAMS: Final[Mapping[str, Callable[[Any, torch.Tensor], Groups]]] = {
    "AutoencoderKLWan": _wan,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLHunyuanVideo": _hunyuan_video,
    "AutoencoderKLMagvit": _magvit,
}
