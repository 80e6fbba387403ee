"""What is measured of latents, and what of it a caller may have said: the terms in which rules of sizes are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from broker_config.errors import InvalidChannels, InvalidSize
from broker_config.latent_geometry.facts import LatentFacts
from broker_config.latent_geometry.layouts import FrameRule


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


def size_of(asked: Asked, height: int, width: int, vae: Compression) -> tuple[int, int]:
    """What the pictures measure in the end: the size asked for where the pipeline resizes them to it."""
    if not vae.resizes:
        return height, width
    return asked.height or height, asked.width or width


def check_channels(found: int, expected: int) -> None:
    """Refuses latents of another VAE."""
    if found != expected:
        raise InvalidChannels(
            f"the latents have {found} channels, this VAE takes {expected}: choose the VAE the pipeline was made for",
            field="latents",
        )


def check_sizes(asked: Asked, *, height: int, width: int, num_frames: int) -> None:
    """Refuses a size or number of frames that is not what the latents decode to."""
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


def check_one(found: int, what: str) -> None:
    """Refuses several of what there is one of."""
    if found != 1:
        raise InvalidSize(f"the latents have {found} of what this layout has one {what} of", field="latents")
