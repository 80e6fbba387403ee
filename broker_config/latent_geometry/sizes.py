"""Shapes: whether latents can be what they are said to be, and how large the pictures become."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from broker_config.errors import InvalidChannels, InvalidOption, InvalidRank, InvalidSize
from broker_config.latent_geometry.facts import LatentFacts
from broker_config.latent_geometry.layouts import LAYOUTS, FrameRule, LatentLayout


class Compression(Protocol):
    """What of a catalogue entry decides sizes."""

    @property
    def channels(self) -> int: ...
    @property
    def spatial(self) -> int: ...
    @property
    def temporal(self) -> int: ...
    @property
    def frames(self) -> FrameRule: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def resizes(self) -> bool: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What latents decode to."""

    #: Pictures or clips.
    batch: int
    #: Frames of each; 1 for pictures.
    num_frames: int
    #: Pixels.
    height: int
    #: Pixels.
    width: int
    #: Whether the job makes clips.
    is_video: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the caller named; None where it did not."""

    height: int | None
    width: int | None
    num_frames: int | None
    facts: LatentFacts

    def need(self, name: str, shape: Sequence[int]) -> int:
        """The value of `name`, which latents of this shape do not tell."""
        value = getattr(self, name, None) or getattr(self.facts, name, None)
        if value is None and name in ("height", "width"):
            raise InvalidSize(
                f"packed latents {list(shape)} do not say their size: give height and width in pixels", field=name
            )
        if value is None:
            raise InvalidSize(
                f"latents {list(shape)} do not say their {name}: give {name} as the pipeline was called with",
                field=name,
            )
        assert isinstance(value, int)
        return value


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
    _check_channels(channels, vae.channels)
    return _picture(asked, vae, batch=batch, rows=rows, columns=columns)


def _patched(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, rows, columns = shape
    _check_channels(channels, vae.channels * 4)
    return _picture(asked, vae, batch=batch, rows=rows * 2, columns=columns * 2)


def _frame(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, frames, rows, columns = shape
    _check_one(frames, "frame")
    return _unpacked((batch, channels, rows, columns), vae, asked)


def _channels_last_image(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, frames, rows, columns, channels = shape
    return _frame((batch, channels, frames, rows, columns), vae, asked)


def _frame_pairs(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, frames, rows, columns = shape
    _check_one(frames, "pair of frames")
    _check_channels(channels, vae.channels * 2)
    return _picture(asked, vae, batch=batch, rows=rows, columns=columns)


def _items(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, _, channels, frames, rows, columns = shape
    return _frame((batch, channels, frames, rows, columns), vae, asked)


def _item_patches(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, length, channels, frames, patch, other = shape
    _check_one(frames, "frame to a patch")
    _check_channels(channels, vae.channels)
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
    _check_channels(channels, vae.channels * patch * patch)
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


def _video(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, latent_frames, rows, columns = shape
    _check_channels(channels, vae.channels)
    num_frames = _frames_of(_without_additional(latent_frames, asked), vae)
    if vae.frames is FrameRule.EVEN and asked.num_frames and num_frames - vae.temporal < asked.num_frames < num_frames:
        num_frames = asked.num_frames  # pipeline_allegro.py __call__: video[:, :, :num_frames]
    height, width = _size(asked, rows * vae.spatial, columns * vae.spatial, vae)
    _check_sizes(asked, height=height, width=width, num_frames=num_frames)
    return Geometry(batch=batch, num_frames=num_frames, height=height, width=width, is_video=True)


def _without_additional(latent_frames: int, asked: Asked) -> int:
    left = latent_frames - (asked.facts.additional_frames or 0)
    if left < 1:
        raise InvalidSize(
            f"additional_frames is {asked.facts.additional_frames}, but there are {latent_frames} latent frames",
            field="additional_frames",
        )
    return left


def _video_canvas(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    latent_frames, num_frames = shape[2], asked.need("num_frames", shape)
    kept = (num_frames - 1) // vae.temporal + 1  # pipelines/ltx2/utils.py trim_canvas
    if kept > latent_frames:
        raise InvalidSize(
            f"num_frames is {num_frames}, but {latent_frames} latent frames decode to "
            f"{_frames_of(latent_frames, vae)}: give num_frames as the pipeline was called with",
            field="num_frames",
        )
    return _video((*shape[:2], kept, *shape[3:]), vae, asked)


def _frames_first(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, frames, channels, rows, columns = shape
    return _video((batch, channels, frames, rows, columns), vae, asked)


def _channels_last(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, frames, rows, columns, channels = shape
    return _video((batch, channels, frames, rows, columns), vae, asked)


def _video_chunks(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    latent_frames, each = _without_additional(shape[2], asked), asked.need("frames_per_call", shape)
    if latent_frames % each:
        raise InvalidSize(
            f"frames_per_call is {each}, but {latent_frames} latent frames are no multiple of it",
            field="frames_per_call",
        )
    made = _video((*shape[:2], each, *shape[3:]), vae, dataclasses.replace(asked, num_frames=None, facts=LatentFacts()))
    frames = latent_frames // each * made.num_frames
    num_frames = (frames - 1) // vae.temporal * vae.temporal + 1  # pipeline_helios.py __call__: generated_frames
    _check_sizes(asked, height=made.height, width=made.width, num_frames=num_frames)
    return dataclasses.replace(made, num_frames=num_frames)


def _video_sections(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    latent_frames, each = shape[2], asked.need("frames_per_call", shape)
    if latent_frames == 1 or (latent_frames - 1) % each:
        raise InvalidSize(
            f"frames_per_call is {each}, but {latent_frames} latent frames are no multiple of it and one: give the "
            "last item of what the pipeline returned, and its latent_window_size",
            field="frames_per_call",
        )
    return _video(shape, vae, asked)


def _video_blended(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
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
    return _video(shape, vae, asked)


def _packed_video(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, length, channels = shape
    patch = asked.facts.patch_size or vae.patch_size
    _check_channels(channels, vae.channels * patch * patch)
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
    return _video(unpacked, vae, dataclasses.replace(asked, height=None, width=None, num_frames=None))


_RULES: Final[Mapping[LatentLayout, Callable[[Sequence[int], Compression, Asked], Geometry]]] = {
    LatentLayout.UNPACKED: _unpacked,
    LatentLayout.PACKED: _packed,
    LatentLayout.VIDEO: _video,
    LatentLayout.VIDEO_CHANNELS_LAST: _video,
    LatentLayout.VIDEO_2D: _video,
    LatentLayout.FRAMES_2D: _frames_first,
    LatentLayout.FRAMES_FIRST: _frames_first,
    LatentLayout.CHANNELS_LAST: _channels_last,
    LatentLayout.CHANNELS_LAST_IMAGE: _channels_last_image,
    LatentLayout.FRAME: _frame,
    LatentLayout.UNPACKED_FRAME: _unpacked,
    LatentLayout.PACKED_FRAME: _packed,
    LatentLayout.LAYERS: _layers,
    LatentLayout.PACKED_VIDEO: _packed_video,
    LatentLayout.PATCHED: _patched,
    LatentLayout.PACKED_PATCHED: _packed_patched,
    LatentLayout.PACKED_PATCHED_LAST: _packed_patched,
    LatentLayout.FRAME_PAIRS: _frame_pairs,
    LatentLayout.ITEMS: _items,
    LatentLayout.ITEM_PATCHES: _item_patches,
    LatentLayout.VIDEO_REASONED: _video,
    LatentLayout.VIDEO_CHUNKS: _video_chunks,
    LatentLayout.VIDEO_CANVAS: _video_canvas,
    LatentLayout.VIDEO_SECTIONS: _video_sections,
    LatentLayout.VIDEO_BLENDED: _video_blended,
}

#: Latent frames of a clip, and the fewest a whole may have (autoencoder_kl_minimax_h3.py `_decode`: clip_length 17,
#: token_drop 3).
_CLIP: Final = 5
_LEAST_OF_CLIPS: Final = 3

#: How often the latents may be decoded, in one direction, in tiles that overlap: four tiles never exceed it.
_MOST_TILED: Final = 4

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
    height, width = _size(asked, rows * vae.spatial, columns * vae.spatial, vae)
    _check_sizes(asked, height=height, width=width, num_frames=1)
    return Geometry(batch=batch, num_frames=1, height=height, width=width, is_video=False)


def _size(asked: Asked, height: int, width: int, vae: Compression) -> tuple[int, int]:
    """What the pictures measure in the end: the size asked for where the pipeline resizes them to it."""
    if not vae.resizes:
        return height, width
    return asked.height or height, asked.width or width


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


def _check_one(found: int, what: str) -> None:
    if found != 1:
        raise InvalidSize(f"the latents have {found} of what this layout has one {what} of", field="latents")


def _check_channels(found: int, expected: int) -> None:
    if found != expected:
        raise InvalidChannels(
            f"the latents have {found} channels, this VAE takes {expected}: choose the VAE the pipeline was made for",
            field="latents",
        )


def _check_sizes(asked: Asked, *, height: int, width: int, num_frames: int) -> None:
    for name, wanted, found in (
        ("height", asked.height, height),
        ("width", asked.width, width),
        ("num_frames", asked.num_frames, num_frames),
    ):
        if wanted is not None and wanted != found:
            raise InvalidSize(
                f"{name} is {wanted}, but the latents decode to {found}: leave {name} out, or check the latents",
                field=name,
            )
