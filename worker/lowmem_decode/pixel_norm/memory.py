"""What a decode holds, by arithmetic on shapes, and how frames are grouped by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from worker.lowmem_decode.attention import query_chunk
from worker.lowmem_decode.pixel_norm.kernels import NearestConv3x3
from worker.lowmem_decode.pixel_norm.steps import Added, Conv, FramesUpsample, Program, Step

#: A strip is this part of the largest activation: several are held at once.
_STRIPS: Final = 24
#: Largest strip on a CPU: several fit a last-level cache.
_STRIP_CPU_BYTES: Final = 16 << 20
#: Strips held at once: what goes into a convolution and what comes out, and what waits at each change of resolution.
_STRIPS_HELD: Final = 7
#: Forms of a convolution's weights at once besides their own: ours, and what the library behind it makes of that.
_FORMS: Final = 2
#: Free memory that may stay in a heap, as a part of the largest activation, and at most: pages that go back are faulted
#: in again.
_SPARE: Final = 2
_SPARE_BYTES: Final = 256 << 20
#: Memory of attention scores, as a part of the largest activation.
_SCORES: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """How one clip is decoded."""

    #: Latent frames that go through the decoder together.
    frames_per_group: int
    #: Bytes of a strip, unless its rows are given.
    strip_bytes: int
    #: Rows of every strip, if they are given.
    strip_rows: int | None
    #: Memory for the scores of attention.
    score_bytes: int
    #: Most memory held at once, above weights, latents and result.
    held_bytes: int
    #: Of the result, for one group.
    group_bytes: int
    #: Free memory that a heap may keep besides.
    spare_bytes: int

    def rows(self, row_bytes: int) -> int:
        """Rows of a strip whose rows take so many bytes."""
        return self.strip_rows or max(1, self.strip_bytes // row_bytes)


@dataclass(kw_only=True, slots=True)
class _Walk:
    """A way through a decoder: the sizes at one place, and what was held on the way, in elements."""

    frames: int
    height: int
    width: int
    channels: int
    #: Whether the frames are the first of the clip.
    first: bool
    #: Largest activation so far.
    largest: int = 0
    #: Rows that convolutions and sums keep.
    rows: int = 0
    #: Frames that convolutions keep from one group to the next.
    pasts: int = 0
    #: Bytes of the widest row a strip has, at the least.
    widest_row: int = 0
    #: Most bytes of weights in another form at once.
    part_bytes: int = 0
    #: Rows by which the result is behind what went in, each convolution's own.
    _lag: int = 0

    def see(self) -> None:
        self.largest = max(self.largest, self.frames * self.height * self.width * self.channels)

    def through(self, step: Step) -> None:
        if isinstance(step, Conv):
            self._conv(step)
        elif isinstance(step, FramesUpsample):
            self.pasts += 2 * self.height * self.width * self.channels
            self.frames = self.frames * 2 - self.first
        elif isinstance(step, Added):
            row, lag = self.frames * self.width * self.channels, self._lag
            for inner in step.steps:
                self.through(inner)
            self.rows += (self._lag - lag + 1) * row
        self.see()

    def _conv(self, step: Conv) -> None:
        kernel = step.kernel
        self.part_bytes = max(self.part_bytes, kernel.part_bytes)
        frames = self.frames + kernel.frames_beside
        self.rows += 2 * frames * self.width * self.channels
        if kernel.frames_beside:
            self.pasts += 2 * self.height * self.width * self.channels
        taken = self.channels * (1 + kernel.frames_beside)
        self.widest_row = max(
            self.widest_row, self.frames * self.width * max(taken, kernel.out_channels * kernel.factor**2)
        )
        self._lag += 1
        self.height *= kernel.factor
        self.width *= kernel.factor
        if isinstance(kernel, NearestConv3x3):
            self.see()  # the repeated pixels
        self.channels = kernel.out_channels
        self.see()
        if step.spread is not None:
            spread = step.spread
            self.height *= spread.factor
            self.width *= spread.factor
            if spread.frames > 1:
                self.frames = self.frames * spread.frames - (spread.frames - 1 if self.first else 0)
            self.channels = spread.channels(self.channels)


def _walk(program: Program, shape: tuple[int, int, int], *, first: bool) -> _Walk:
    frames, height, width = shape
    walk = _Walk(frames=frames, height=height, width=width, channels=program.latent_channels, first=first)
    for segment in program.segments:
        for step in segment:
            walk.through(step)
    return walk


def _stored(program: Program, frames: int, clip_frames: int, pixels: int, *, score_bytes: int) -> int:
    """Elements of what attention needs."""
    if not program.attentions:
        return 0
    channels = int(program.attentions[0].out.in_channels)
    held = frames * pixels * channels + 5 * pixels * channels
    held += sum(2 * clip_frames * pixels * channels for block in program.attentions if block.over_frames)
    if program.device.type != "cpu":
        keys = pixels * (clip_frames if program.attentions[0].over_frames else 1)
        scores = 8 * pixels * query_chunk(keys, device=program.device, score_bytes=score_bytes)
        held += scores // program.dtype.itemsize
    return int(held)


def largest_activation(program: Program, shape: Sequence[int]) -> int:
    """Elements of the largest activation of one clip, as the VAE's own decode makes it."""
    frames, height, width = shape
    per_call = program.frames_per_call or frames
    calls = [(min(per_call, frames), True)] + ([(per_call, False)] if frames > per_call else [])
    return max(_walk(program, (count, height, width), first=first).largest for count, first in calls)


def frames_of_latent(program: Program) -> tuple[int, int]:
    """Frames that the first latent frame of a clip becomes, and any other."""
    first, following = (_walk(program, (1, 1, 1), first=first).frames for first in (True, False))
    return first * program.patches.frames, following * program.patches.frames


def result_shape(program: Program, shape: Sequence[int]) -> tuple[int, int, int]:
    """Frames, rows and columns that latents of (frames, rows, columns) become."""
    frames, height, width = shape
    walk = _walk(program, (frames, height, width), first=True)
    factor = program.patches.factor
    return walk.frames * program.patches.frames, walk.height * factor, walk.width * factor


def arrange(program: Program, shape: Sequence[int], *, strip_rows: int | None) -> Arrangement:
    """Chooses how many frames go together, for latents of (frames, rows, columns).

    One after the other, if that takes less and is possible: of a long clip. All of them otherwise.
    """
    frames = shape[0]
    together = _with_groups_of(program, shape, frames, strip_rows)
    if not program.causal or frames == 1:
        return together
    apart = _with_groups_of(program, shape, 1, strip_rows)
    return min(together, apart, key=lambda way: way.held_bytes + way.group_bytes)


def _with_groups_of(program: Program, shape: Sequence[int], count: int, strip_rows: int | None) -> Arrangement:
    frames, height, width = shape
    itemsize = program.dtype.itemsize
    largest = largest_activation(program, shape) * itemsize
    strip_bytes = max(1, largest // _STRIPS)
    if program.device.type == "cpu":
        strip_bytes = min(strip_bytes, _STRIP_CPU_BYTES)
    score_bytes = max(1, largest // _SCORES)
    walk = _walk(program, (count, height, width), first=count == frames)
    held = walk.rows + (walk.pasts if count < frames else 0)
    held += _stored(program, count, frames, height * width, score_bytes=score_bytes)
    patches = program.patches
    pixels = walk.frames * walk.height * walk.width * patches.frames * patches.factor**2
    held_bytes = held * itemsize + max(strip_bytes, walk.widest_row * itemsize) * _STRIPS_HELD
    held_bytes += walk.part_bytes * _FORMS
    group_bytes = pixels * patches.channels(walk.channels) * itemsize
    return Arrangement(
        frames_per_group=count,
        strip_bytes=strip_bytes,
        strip_rows=strip_rows,
        score_bytes=score_bytes,
        held_bytes=held_bytes,
        group_bytes=group_bytes,
        spare_bytes=min(_SPARE_BYTES, largest // _SPARE),
    )
