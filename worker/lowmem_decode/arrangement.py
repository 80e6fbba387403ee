"""What is stored and what is computed again: decided before a decode, by arithmetic on shapes.

The largest activation of an AutoencoderKL is the result of its last upsample: the widest channels at full resolution.
Stored, it and the hidden activation of the block after it are one and a half of it (mode 1). Computed again each time
it is read, what remains is the block's hidden activation and the upsample's input, three quarters (lean); the blocks
after it then give up their hidden activations too. Families of another shape need other choices, so none is written
down here: each choice is the cheapest one that stays inside the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from worker.lowmem_decode.attention import query_chunk
from worker.lowmem_decode.group_norm import piece_sizes
from worker.lowmem_decode.steps import Attention, Program, Resnet, Step, Upsampling

#: Working memory over the largest activation: what mode 1 and the lean mode may take. Mode 1 is measured against 1.6:
#: on a CPU libraries and heap add some 3 %.
_BUDGET: Final = 1.55
_LEAN_BUDGET: Final = 1.0
#: A strip is such a part of the largest activation, and several are held at once: large ones where they fit this part
#: of the budget and let as much be stored as the usual ones.
_LARGE_STRIPS: Final = 64
_LARGE_STRIPS_BUDGET: Final = 0.85
_USUAL_STRIPS: Final = 128
#: Slower by a fifth, so only where they keep all that is held, the result included, within such a part of the largest
#: activation, and usual ones do not: of a VAE with few channels the result is much.
_SMALL_STRIPS: Final = 256
_WITH_RESULT: Final = 1.57
#: Largest strip on a CPU: several fit a last-level cache, and glibc's heap (see `host_memory`).
_STRIP_CPU_BYTES: Final = 8 << 20
#: The same elsewhere: in half precision 65,000 pixels of 256 channels, which is work enough for any device.
_STRIP_BYTES: Final = 32 << 20
#: Memory of attention scores, as a part of the largest activation.
_SCORES: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a step stands: the sizes of its input."""

    step: Step
    height: int
    #: A row, without channels.
    inner: tuple[int, ...]
    channels: int

    @property
    def row(self) -> int:
        """Pixels of a row."""
        return math.prod(self.inner)

    @property
    def window_row(self) -> int:
        """Pixels of a row of a convolution's window."""
        return self.row if len(self.inner) == 1 else (self.inner[0] + 2) * (self.inner[1] + 2)

    @property
    def pictures_row(self) -> int:
        """Pixels of a row of the pictures that a clip's window becomes, as of one frame's channels; 0 of a picture."""
        return 0 if len(self.inner) == 1 else 3 * self.inner[0] * (self.inner[1] + 2)

    @property
    def pixels(self) -> int:
        """Pixels of the input."""
        return self.height * self.row

    def result_row(self) -> int:
        """Pixels of a row of the result."""
        return math.prod(self.step.grown(self.inner)) if isinstance(self.step, Upsampling) else self.row

    def result_height(self) -> int:
        """Rows of the result."""
        return self.height * 2 if isinstance(self.step, Upsampling) else self.height


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """How one item is decoded."""

    #: For each step: whether the result of an upsample, or the hidden activation of a block, is stored.
    stores: tuple[bool, ...]
    #: Bytes of a strip, unless its rows are given.
    strip_bytes: int
    #: Rows of every strip, if they are given.
    strip_rows: int | None
    #: Elements that a norm takes at a time.
    piece_elements: int
    #: Memory for the scores of attention.
    score_bytes: int
    #: Most memory held at once, above the weights and without latents and picture.
    peak_bytes: int
    #: Multiplications of each step, those done again included.
    costs: tuple[float, ...]

    def rows(self, *, row: int, channels: int, itemsize: int) -> int:
        """Rows of a strip of an activation whose rows have so many pixels."""
        return self.strip_rows or max(1, self.strip_bytes // (row * channels * itemsize))


def places(program: Program, *, height: int, inner: tuple[int, ...]) -> list[Place]:
    """Each step with the sizes of its input, for latents of this size."""
    found = []
    channels = program.parts.entry.channels
    for step in program.parts.steps:
        found.append(Place(step=step, height=height, inner=inner, channels=channels))
        if isinstance(step, Upsampling):
            height, inner = height * 2, step.grown(inner)
        channels = step.channels
    return found


def result_size(program: Program, *, height: int, inner: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Rows, and a row without channels, of what latents of this size become."""
    for step in program.parts.steps:
        if isinstance(step, Upsampling):
            height, inner = height * 2, step.grown(inner)
    return height, inner


def largest_activation(program: Program, *, height: int, inner: tuple[int, ...]) -> int:
    """Elements of the largest activation of one item, as the plain decode makes it."""
    largest = height * math.prod(inner) * program.parts.entry.channels
    for place in places(program, height=height, inner=inner):
        channels = place.step.channels
        if not isinstance(place.step, Upsampling) or place.step.repeats_pixels:
            channels = max(channels, place.channels)  # of an upsample: the repeated pixels
        largest = max(largest, place.result_height() * place.result_row() * channels)
    return largest


def budget_bytes(largest: int, *, lean: bool) -> int:
    """What a decode may hold whose largest activation has so many bytes."""
    return int(largest * (_LEAN_BUDGET if lean else _BUDGET))


def arrange(
    program: Program, *, height: int, inner: tuple[int, ...], budget: int, strip_rows: int | None
) -> Arrangement:
    """Chooses what is stored for latents of this size.

    Args:
        program: the decoder.
        height: rows of the latents.
        inner: a row of the latents, without channels: (w,) or (t, w).
        budget: bytes it may hold at once.
        strip_rows: rows of every strip; None: by size.
    """
    ways = [
        _with_pieces(program, elements, height=height, inner=inner, budget=budget, strip_rows=strip_rows)
        for elements in piece_sizes(program.device)
    ]
    fitting = [each for each in ways if each.peak_bytes <= budget]
    # of equal ones the first
    return min(fitting, key=lambda each: sum(each.costs)) if fitting else min(ways, key=lambda each: each.peak_bytes)


def _with_pieces(
    program: Program, elements: int, *, height: int, inner: tuple[int, ...], budget: int, strip_rows: int | None
) -> Arrangement:
    largest = largest_activation(program, height=height, inner=inner) * program.dtype.itemsize
    where = places(program, height=height, inner=inner)

    def way(strips: int) -> Arrangement:
        strip_bytes = max(1, largest // strips)
        strip_bytes = min(strip_bytes, _STRIP_CPU_BYTES if program.device.type == "cpu" else _STRIP_BYTES)
        draft = Arrangement(
            stores=(),
            strip_bytes=strip_bytes,
            strip_rows=strip_rows,
            piece_elements=elements,
            score_bytes=max(1, largest // _SCORES),
            peak_bytes=0,
            costs=(),
        )
        return _stored(program, draft, where, budget=budget)

    large, usual, small = (way(strips) for strips in (_LARGE_STRIPS, _USUAL_STRIPS, _SMALL_STRIPS))
    result = _result_bytes(program, height=height, inner=inner)
    if usual.peak_bytes + result > _WITH_RESULT * largest >= small.peak_bytes + result:
        usual = min((usual, small), key=lambda each: (sum(each.costs), each.peak_bytes))
    # strips of a piece are by its own size, though it may have room to spare
    room = min(budget, budget_bytes(largest, lean=False)) * _LARGE_STRIPS_BUDGET
    return usual if large.peak_bytes > room else min((large, usual), key=lambda each: sum(each.costs))


def _result_bytes(program: Program, *, height: int, inner: tuple[int, ...]) -> int:
    """Bytes of what latents of this size become."""
    height, inner = result_size(program, height=height, inner=inner)
    return height * math.prod(inner) * program.parts.head.channels * program.dtype.itemsize


def _stored(program: Program, draft: Arrangement, where: list[Place], *, budget: int) -> Arrangement:
    """The draft, with what is stored chosen step by step."""
    stores: list[bool] = []
    costs: list[float] = []
    peak = 0
    for group in _groups(where):
        ways = [_Way.of(program, draft, group, choice) for choice in _choices(group)]
        fitting = [way for way in ways if way.bytes <= budget]
        way = min(fitting, key=lambda way: sum(way.costs)) if fitting else min(ways, key=lambda way: way.bytes)
        stores += way.stores
        costs += way.costs
        peak = max(peak, way.bytes)
    return replace(draft, stores=tuple(stores), peak_bytes=peak, costs=tuple(costs))


def _groups(where: list[Place]) -> Iterator[list[Place]]:
    """An upsample and the block that reads it are one choice; every other step is one by itself."""
    number = 0
    while number < len(where):
        pair = where[number : number + 2]
        together = len(pair) == 2 and isinstance(pair[0].step, Upsampling) and isinstance(pair[1].step, Resnet)
        yield pair if together else pair[:1]
        number += 2 if together else 1


def _choices(group: list[Place]) -> list[tuple[bool, ...]]:
    if isinstance(group[0].step, Attention):
        return [(True,)]
    if len(group) == 1 and isinstance(group[0].step, Upsampling):
        return [(True,)]
    return list(itertools.product((True, False), repeat=len(group)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """One way to run a group of steps."""

    stores: tuple[bool, ...]
    bytes: int
    costs: tuple[float, ...]

    @classmethod
    def of(cls, program: Program, draft: Arrangement, group: list[Place], stores: tuple[bool, ...]) -> _Way:
        first, last = group[0], group[-1]
        itemsize = program.dtype.itemsize
        if isinstance(first.step, Attention):
            tokens = first.pixels
            chunk = query_chunk(tokens, device=program.device, score_bytes=draft.score_bytes)
            scores = 0 if program.device.type == "cpu" else 8 * tokens * chunk
            cost = 4.0 * tokens * first.channels**2 + 2.0 * tokens**2 * first.channels
            return cls(stores=stores, bytes=7 * tokens * first.channels * itemsize + scores, costs=(cost,))
        upsample = first if isinstance(first.step, Upsampling) else None
        block = last if isinstance(last.step, Resnet) else None
        held = 0
        costs: list[float] = []
        if upsample is not None:
            held, cost = _upsample(upsample, draft, itemsize, stored=stores[0])
            costs.append(cost * (1 if stores[0] else 3))
        if block is not None:
            again = upsample if upsample is not None and not stores[0] else None
            needed, cost = _resnet(block, draft, program, again, keep_hidden=stores[-1])
            held = max(held, needed)
            costs.append(cost)
        return cls(stores=stores, bytes=held, costs=tuple(costs))


def _upsample(place: Place, draft: Arrangement, itemsize: int, *, stored: bool) -> tuple[int, float]:
    """Bytes while it is run (or first read), and multiplications of one run."""
    step = place.step
    assert isinstance(step, Upsampling)
    made = place.result_height() * place.result_row() * step.channels
    held = place.pixels * place.channels + (made if stored else 0)
    cost = float(place.pixels * place.channels * step.taps)
    return held * itemsize + _upsample_strips(place, draft, itemsize), cost


def _upsample_strips(place: Place, draft: Arrangement, itemsize: int) -> int:
    """Bytes of the strips an upsample holds."""
    row, channels = place.result_row(), place.step.channels
    rows = min(draft.rows(row=row, channels=channels, itemsize=itemsize), place.height * 2) + 2
    low = ((rows // 2 + 3) * place.window_row + (rows // 2 + 2) * place.pictures_row) * place.channels
    # the strip itself, and the convolution's result before it is spread over it
    return (low + rows * row * channels * 2) * itemsize


def _resnet(
    place: Place, draft: Arrangement, program: Program, again: Place | None, *, keep_hidden: bool
) -> tuple[int, float]:
    """Bytes while a block is run, and its multiplications."""
    step = place.step
    assert isinstance(step, Resnet)
    itemsize = program.dtype.itemsize
    pixels, row = place.pixels, place.row
    hidden, out = step.hidden_channels, step.channels
    held = again.pixels * again.channels if again is not None else pixels * place.channels
    if keep_hidden:
        held += pixels * hidden
    elif again is not None or step.shortcut is not None:
        held += pixels * out
    rows = draft.rows(row=row, channels=max(place.channels, hidden), itemsize=itemsize)
    rows = min(rows, place.height)
    window, pictures = (rows + 3) * place.window_row, (rows + 2) * place.pictures_row
    fed, rows = rows, rows + 1  # the last strip also brings the row that waited for it
    results = 1 if place.pictures_row else 2  # of a clip one: its strip is a view of what the convolution made
    first = window * place.channels + rows * results * row * hidden
    second = window * hidden + rows * results * row * out
    if keep_hidden:
        strips = max(first + pictures * place.channels, second + pictures * hidden)
    else:  # pictures live as long as their convolution runs: those of one of the two
        strips = first + second + pictures * max(place.channels, hidden)
    if again is not None:
        strips += rows * row * place.channels * (1 if keep_hidden else 2)
    piece = max(row * place.channels, min(fed * row * place.channels, draft.piece_elements))
    scratch = 4 * 2 * piece
    extra = _upsample_strips(again, draft, itemsize) if again is not None else 0
    taps = float(step.conv1.weight.shape[2:].numel())
    cost = taps * pixels * hidden * (place.channels * (1 if keep_hidden else 2) + out)
    return (held + strips) * itemsize + scratch + extra, cost
