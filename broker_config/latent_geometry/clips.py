"""How large clips become, and how many frames they have, layout by layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

from broker_config.errors import InvalidSize
from broker_config.latent_geometry.facts import LatentFacts
from broker_config.latent_geometry.layouts import FrameRule
from broker_config.latent_geometry.measured import (
    Asked,
    Compression,
    Geometry,
    check_channels,
    check_sizes,
    size_of,
)

#: Latent frames of a clip, and the fewest a whole may have (autoencoder_kl_minimax_h3.py `_decode`: clip_length 17,
#: token_drop 3).
_CLIP: Final = 5
_LEAST_OF_CLIPS: Final = 3
#: How often the latents may be decoded, in one direction, in tiles that overlap: four tiles never exceed it.
_MOST_TILED: Final = 4


def video(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    """(B, C, f, h, w)."""
    batch, channels, latent_frames, rows, columns = shape
    check_channels(channels, vae.channels)
    num_frames = _frames_of(_without_additional(latent_frames, asked), vae)
    if vae.frames is FrameRule.EVEN and asked.num_frames and num_frames - vae.temporal < asked.num_frames < num_frames:
        num_frames = asked.num_frames  # pipeline_allegro.py __call__: video[:, :, :num_frames]
    height, width = size_of(asked, rows * vae.spatial, columns * vae.spatial, vae)
    check_sizes(asked, height=height, width=width, num_frames=num_frames)
    return Geometry(batch=batch, num_frames=num_frames, height=height, width=width, is_video=True)


def _without_additional(latent_frames: int, asked: Asked) -> int:
    left = latent_frames - (asked.facts.additional_frames or 0)
    if left < 1:
        raise InvalidSize(
            f"additional_frames is {asked.facts.additional_frames}, but there are {latent_frames} latent frames",
            field="additional_frames",
        )
    return left


def video_canvas(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    """The same, of which only what was asked for is kept."""
    latent_frames, num_frames = shape[2], asked.need("num_frames", shape)
    kept = (num_frames - 1) // vae.temporal + 1  # pipelines/ltx2/utils.py trim_canvas
    if kept > latent_frames:
        raise InvalidSize(
            f"num_frames is {num_frames}, but {latent_frames} latent frames decode to "
            f"{_frames_of(latent_frames, vae)}: give num_frames as the pipeline was called with",
            field="num_frames",
        )
    return video((*shape[:2], kept, *shape[3:]), vae, asked)


def frames_first(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    """(B, f, C, h, w)."""
    batch, frames, channels, rows, columns = shape
    left = _without_additional(frames, asked)
    if asked.num_frames is not None and (asked.num_frames - 1) // vae.temporal + 1 == left:
        # pipeline_cogvideox.py __call__ makes so many latent frames of them, and returns what these decode to
        asked = dataclasses.replace(asked, num_frames=None)
    return video((batch, channels, frames, rows, columns), vae, asked)


def channels_last(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    """(B, f, h, w, C)."""
    batch, frames, rows, columns, channels = shape
    return video((batch, channels, frames, rows, columns), vae, asked)


def video_chunks(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    """Decoded a few latent frames at a time, each part afresh."""
    latent_frames, each = _without_additional(shape[2], asked), asked.need("frames_per_call", shape)
    if latent_frames % each:
        raise InvalidSize(
            f"frames_per_call is {each}, but {latent_frames} latent frames are no multiple of it",
            field="frames_per_call",
        )
    made = video((*shape[:2], each, *shape[3:]), vae, dataclasses.replace(asked, num_frames=None, facts=LatentFacts()))
    frames = latent_frames // each * made.num_frames
    num_frames = (frames - 1) // vae.temporal * vae.temporal + 1  # pipeline_helios.py __call__: generated_frames
    check_sizes(asked, height=made.height, width=made.width, num_frames=num_frames)
    return dataclasses.replace(made, num_frames=num_frames)


def video_sections(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    """Decoded in sections that overlap by frames."""
    latent_frames, each = shape[2], asked.need("frames_per_call", shape)
    if latent_frames == 1 or (latent_frames - 1) % each:
        raise InvalidSize(
            f"frames_per_call is {each}, but {latent_frames} latent frames are no multiple of it and one: give the "
            "last item of what the pipeline returned, and its latent_window_size",
            field="frames_per_call",
        )
    return video(shape, vae, asked)


def video_blended(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    """Decoded in tiles that overlap by pixels."""
    rows, columns, overlap = asked.facts.tiles
    for size, count in ((shape[3], rows), (shape[4], columns)):
        tile = (size + (count - 1) * overlap) // count
        if tile < max(overlap, 1) or count * tile > _MOST_TILED * size:
            raise InvalidSize(
                f"{count} tiles of {size} latent pixels that share {overlap} have {tile}, expected as many as they "
                f"share, and {_MOST_TILED} times the latents at most: give blended_tiles as the pipeline was called "
                "with",
                field="blended_tiles",
            )
    return video(shape, vae, asked)


def packed_video(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    """(B, tokens, p²·C)."""
    batch, length, channels = shape
    patch = asked.facts.patch_size or vae.patch_size
    check_channels(channels, vae.channels * patch * patch)
    height, width = asked.need("height", shape), asked.need("width", shape)
    num_frames = asked.need("num_frames", shape)
    side = vae.spatial * patch
    rows, columns, frames = height // side, width // side, (num_frames - 1) // vae.temporal + 1
    if rows * columns * frames != length:
        raise InvalidSize(
            f"height {height}, width {width} and num_frames {num_frames} make {frames} × {rows} × {columns} = "
            f"{frames * rows * columns} patches, the packed latents have {length}: give the size and the frames the "
            "pipeline was called with",
            field="height",
        )
    unpacked = (batch, vae.channels, frames, rows * patch, columns * patch)
    # pipeline_ltx.py rounds sizes and frames down to what the VAE makes.
    return video(unpacked, vae, dataclasses.replace(asked, height=None, width=None, num_frames=None))


def _frames_of(latent_frames: int, vae: Compression) -> int:
    if vae.frames is FrameRule.EVEN or (vae.frames is FrameRule.PAIRS and latent_frames % 2 == 0):
        return latent_frames * vae.temporal
    if vae.frames is FrameRule.CLIPS:
        if latent_frames < _LEAST_OF_CLIPS:
            raise InvalidSize(
                f"the latents have {latent_frames} frames, this VAE decodes no fewer than {_LEAST_OF_CLIPS}",
                field="latents",
            )
        return latent_frames * vae.temporal - (vae.temporal - 1) * math.ceil(latent_frames / _CLIP)
    return (latent_frames - 1) * vae.temporal + 1
