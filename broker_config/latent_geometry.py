"""What a tensor of latents decodes to, by arithmetic alone: no torch, nothing allocated.

A layout names how a pipeline hands its latents out. What must happen to the numbers is the worker's business
(`worker/latent_layouts.py`); here is only what shapes are possible and how large the pictures become.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from broker_config.errors import InvalidChannels, InvalidRank, InvalidSize


class LatentLayout(StrEnum):
    """How latents are laid out."""

    #: (B, C, h, w) of an image VAE.
    UNPACKED = "unpacked"
    #: (B, (h/2)·(w/2), 4·C): 2×2 patches in raster order, as FLUX.1 works on them; needs height and width.
    PACKED = "packed"
    #: (B, C, f, h, w) of a video VAE.
    VIDEO = "video"
    #: (B, C, F, h, w) whose frames an image VAE decodes one by one (AnimateDiff).
    VIDEO_2D = "video_2d"


class Compression(Protocol):
    """What of a catalogue entry decides sizes."""

    @property
    def channels(self) -> int: ...
    @property
    def spatial(self) -> int: ...
    @property
    def temporal(self) -> int: ...


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
    """Sizes the caller named; None where it did not."""

    height: int | None
    width: int | None
    num_frames: int | None


def measure(
    layout: LatentLayout,
    shape: Sequence[int],
    *,
    vae: Compression,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
) -> Geometry:
    """What latents of `shape` decode to.

    Args:
        layout: how they are laid out.
        shape: their shape.
        vae: channels and compression.
        height: pixels; needed for packed latents, checked against the shape otherwise.
        width: pixels, likewise.
        num_frames: frames of each clip, checked against the shape.

    Raises:
        InvalidRank: wrong number of dimensions.
        InvalidChannels: wrong number of channels.
        InvalidSize: an empty dimension, or height, width, num_frames do not fit the shape.
    """
    if any(size < 1 for size in shape):
        raise InvalidSize(f"latents {list(shape)} have an empty dimension", field="latents")
    form, rule = _RULES[layout]
    if len(shape) != form.count(",") + 1:
        raise InvalidRank(
            f"latents {list(shape)} have {len(shape)} dimensions, layout {layout} takes {form}",
            field="latents",
        )
    return rule(shape, vae, Asked(height=height, width=width, num_frames=num_frames))


def _unpacked(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, rows, columns = shape
    _check_channels(channels, vae.channels)
    height, width = rows * vae.spatial, columns * vae.spatial
    _check_sizes(asked, height=height, width=width, num_frames=1)
    return Geometry(batch=batch, num_frames=1, height=height, width=width, is_video=False)


def _packed(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, length, channels = shape
    _check_channels(channels, vae.channels * 4)
    if asked.height is None or asked.width is None:
        missing = "height" if asked.height is None else "width"
        raise InvalidSize(
            f"packed latents {list(shape)} do not say their size: give height and width in pixels",
            field=missing,
        )
    patch = vae.spatial * 2  # pipeline_flux.py _unpack_latents: 2 * (height // (vae_scale_factor * 2))
    rows, columns = asked.height // patch, asked.width // patch
    if rows < 1 or columns < 1 or rows * columns != length:
        raise InvalidSize(
            f"height {asked.height} and width {asked.width} make {rows} × {columns} = {rows * columns} patches of "
            f"{patch} px, the packed latents have {length}: give the size the pipeline was called with",
            field="height",
        )
    _check_sizes(Asked(height=None, width=None, num_frames=asked.num_frames), height=0, width=0, num_frames=1)
    return Geometry(batch=batch, num_frames=1, height=rows * patch, width=columns * patch, is_video=False)


def _video(shape: Sequence[int], vae: Compression, asked: Asked) -> Geometry:
    batch, channels, latent_frames, rows, columns = shape
    _check_channels(channels, vae.channels)
    num_frames = (latent_frames - 1) * vae.temporal + 1
    height, width = rows * vae.spatial, columns * vae.spatial
    _check_sizes(asked, height=height, width=width, num_frames=num_frames)
    return Geometry(batch=batch, num_frames=num_frames, height=height, width=width, is_video=True)


_RULES: Final[Mapping[LatentLayout, tuple[str, Callable[[Sequence[int], Compression, Asked], Geometry]]]] = {
    LatentLayout.UNPACKED: ("(batch, channels, h, w)", _unpacked),
    LatentLayout.PACKED: ("(batch, length, 4*channels)", _packed),
    LatentLayout.VIDEO: ("(batch, channels, frames, h, w)", _video),
    LatentLayout.VIDEO_2D: ("(batch, channels, frames, h, w)", _video),
}


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
