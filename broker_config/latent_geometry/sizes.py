"""Shapes: whether latents can be what they are said to be, and how large the pictures become."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from broker_config.errors import InvalidOption, InvalidRank, InvalidSize
from broker_config.latent_geometry import clips
from broker_config.latent_geometry.facts import LatentFacts
from broker_config.latent_geometry.layouts import LAYOUTS, LatentLayout
from broker_config.latent_geometry.measured import (
    Asked,
    Compression,
    Geometry,
    check_channels,
    check_one,
    check_sizes,
    size_of,
)


def measure(
    layout: LatentLayout,
    shape: Sequence[int],
    *,
    vae: Compression,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    facts: LatentFacts | None = None,
) -> Geometry:
    """What latents of `shape` decode to.

    Args:
        layout: how they are laid out.
        shape: their shape.
        vae: channels and compression.
        height: pixels; needed for packed latents, checked against the shape otherwise.
        width: pixels, likewise.
        num_frames: frames of each clip, checked against the shape; needed for packed clips.
        facts: what else the caller named.

    Raises:
        InvalidRank: wrong number of dimensions.
        InvalidChannels: wrong number of channels.
        InvalidSize: an empty dimension, or height, width, num_frames do not fit the shape.
        InvalidOption: a fact that this layout has no use for.
    """
    if any(size < 1 for size in shape):
        raise InvalidSize(f"latents {list(shape)} have an empty dimension", field="latents")
    form = LAYOUTS[layout]
    if len(shape) != form.rank:
        raise InvalidRank(
            f"latents {list(shape)} have {len(shape)} dimensions, layout {layout} takes {form.form}",
            field="latents",
        )
    asked = Asked(height=height, width=width, num_frames=num_frames, facts=facts or LatentFacts())
    _check_facts(layout, asked.facts)
    return _RULES[layout](shape, vae, asked)


def _unpacked(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, rows, columns = shape
    check_channels(channels, vae.channels)
    return _picture(asked, vae, batch=batch, rows=rows, columns=columns)


def _patched(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, rows, columns = shape
    check_channels(channels, vae.channels * 4)
    return _picture(asked, vae, batch=batch, rows=rows * 2, columns=columns * 2)


def _frame(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, frames, rows, columns = shape
    check_one(frames, "frame")
    return _unpacked((batch, channels, rows, columns), vae, asked)


def _channels_last_image(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, frames, rows, columns, channels = shape
    return _frame((batch, channels, frames, rows, columns), vae, asked)


def _frame_pairs(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, frames, rows, columns = shape
    check_one(frames, "pair of frames")
    check_channels(channels, vae.channels * 2)
    return _picture(asked, vae, batch=batch, rows=rows, columns=columns)


def _items(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, _, channels, frames, rows, columns = shape
    return _frame((batch, channels, frames, rows, columns), vae, asked)


def _item_patches(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, length, channels, frames, patch, other = shape
    check_one(frames, "frame to a patch")
    check_channels(channels, vae.channels)
    rows, columns = (asked.need(name, shape) // (vae.spatial * patch) for name in ("height", "width"))
    if patch != other or rows < 1 or columns < 1 or rows * columns > length:
        raise InvalidSize(
            f"height {asked.height} and width {asked.width} make {rows} × {columns} = {rows * columns} patches of "
            f"{patch} × {other}, the latents have {length}: give the size the pipeline was called with",
            field="height",
        )
    asked = dataclasses.replace(asked, height=None, width=None)
    return _picture(asked, vae, batch=batch, rows=rows * patch, columns=columns * patch)


def _packed(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    patch = asked.facts.patch_size or vae.patch_size
    return _tokens(shape, vae, asked, patch=patch, pictures=1)


def _packed_patched(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    return _tokens(shape, vae, asked, patch=2, pictures=1)


def _layers(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    layers = asked.need("layers", shape)
    made = _tokens(shape, vae, asked, patch=2, pictures=layers + 1)
    return dataclasses.replace(made, batch=made.batch * layers)


def _tokens(shape: Sequence[int], vae: Compression, asked: Asked, *, patch: int, pictures: int) -> Geometry:
    batch, length, channels = shape
    check_channels(channels, vae.channels * patch * patch)
    height, width = asked.need("height", shape), asked.need("width", shape)
    side = vae.spatial * patch  # pipeline_flux.py _unpack_latents: 2 * (height // (vae_scale_factor * 2))
    rows, columns = height // side, width // side
    if patch == 1 and rows * columns * pictures != length:
        # pipeline_qwenimage21.py _unpack_latents: tokens of one latent pixel, of which there are an even number a side
        rows, columns = height // (side * 2) * 2, width // (side * 2) * 2
    if rows < 1 or columns < 1 or rows * columns * pictures != length:
        raise InvalidSize(
            f"height {height} and width {width} make {rows} × {columns} = {rows * columns} patches of "
            f"{side} px{'' if pictures == 1 else f', {pictures} times'}, the packed latents have {length}: give the "
            "size the pipeline was called with",
            field="height",
        )
    asked = dataclasses.replace(asked, height=None, width=None)
    return _picture(asked, vae, batch=batch, rows=rows * patch, columns=columns * patch)


_RULES: Final[Mapping[LatentLayout, Callable[[Sequence[int], Compression, Asked], Geometry]]] = {
    LatentLayout.UNPACKED: _unpacked,
    LatentLayout.PACKED: _packed,
    LatentLayout.VIDEO: clips.video,
    LatentLayout.VIDEO_CHANNELS_LAST: clips.video,
    LatentLayout.VIDEO_2D: clips.video,
    LatentLayout.FRAMES_2D: clips.frames_first,
    LatentLayout.FRAMES_FIRST: clips.frames_first,
    LatentLayout.CHANNELS_LAST: clips.channels_last,
    LatentLayout.CHANNELS_LAST_IMAGE: _channels_last_image,
    LatentLayout.FRAME: _frame,
    LatentLayout.UNPACKED_FRAME: _unpacked,
    LatentLayout.PACKED_FRAME: _packed,
    LatentLayout.LAYERS: _layers,
    LatentLayout.PACKED_VIDEO: clips.packed_video,
    LatentLayout.PATCHED: _patched,
    LatentLayout.PACKED_PATCHED: _packed_patched,
    LatentLayout.PACKED_PATCHED_LAST: _packed_patched,
    LatentLayout.FRAME_PAIRS: _frame_pairs,
    LatentLayout.ITEMS: _items,
    LatentLayout.ITEM_PATCHES: _item_patches,
    LatentLayout.VIDEO_REASONED: clips.video,
    LatentLayout.VIDEO_CHUNKS: clips.video_chunks,
    LatentLayout.VIDEO_CANVAS: clips.video_canvas,
    LatentLayout.VIDEO_SECTIONS: clips.video_sections,
    LatentLayout.VIDEO_BLENDED: clips.video_blended,
}


#: Facts of sizes, and the layouts that have a use for them; elsewhere they would be ignored, and the caller misled.
_USES: Final[Mapping[str, frozenset[LatentLayout]]] = {
    "patch_size": frozenset({LatentLayout.PACKED, LatentLayout.PACKED_FRAME, LatentLayout.PACKED_VIDEO}),
    "layers": frozenset({LatentLayout.LAYERS}),
    "additional_frames": frozenset({LatentLayout.VIDEO, LatentLayout.FRAMES_FIRST, LatentLayout.VIDEO_CHUNKS}),
    "blended_tiles": frozenset({LatentLayout.VIDEO_BLENDED}),
    "frames_per_call": frozenset(
        {LatentLayout.VIDEO_2D, LatentLayout.FRAMES_2D, LatentLayout.VIDEO_CHUNKS, LatentLayout.VIDEO_SECTIONS}
    ),
}


def _check_facts(layout: LatentLayout, facts: LatentFacts) -> None:
    for name, layouts in _USES.items():
        if getattr(facts, name) and layout not in layouts:
            raise InvalidOption(
                f"{name} is {getattr(facts, name)}, but layout {layout} has no use for it; "
                f"{', '.join(sorted(layouts))} have: leave it out, or name the layout",
                field=name,
            )


def _picture(asked: Asked, vae: Compression, *, batch: int, rows: int, columns: int) -> Geometry:
    height, width = size_of(asked, rows * vae.spatial, columns * vae.spatial, vae)
    check_sizes(asked, height=height, width=width, num_frames=1)
    return Geometry(batch=batch, num_frames=1, height=height, width=width, is_video=False)
