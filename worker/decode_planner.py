"""Chooses how a decode is run, and how much goes into one call, from what decodes took here.

Time and memory of a call are taken as linear in its decoded pixels, with a constant: kernels to start, weights to read,
workspaces. (Attention in the mid-block is quadratic; at 1024² it is a hundredth of an AutoencoderKL's multiplications.)
The lines are fitted to a few decodes of growing size (`worker.decode_probes`) and kept for each VAE, dtype and device.

A call is worth growing as long as its constant weighs: `CostModel.budget_px`. So small latents batch and large ones do
not, and nobody has to say what is small. Pure: no torch, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Final

#: Part of the free memory a plan uses: fragmentation, and what other threads take meanwhile.
_USABLE: Final = 0.85
#: A call need not grow when the time for a pixel would fall by less than this.
_WORTHWHILE: Final = 0.05
#: Plain decode is left for a way that is faster by more than this; two measurements of one way differ as much.
_NO_FASTER: Final = 0.03


class DecodeMode(StrEnum):
    """One way to decode, as it is measured and planned."""

    PLAIN = "plain"
    FAST = "fast"
    COMPILED = "compiled"
    LOW_MEMORY = "low_memory"
    LEAN = "lean"
    TILED = "tiled"


#: Ways of mode fast alone: other last bits in the memory of plain decode.
FAST_MODES: Final = frozenset({DecodeMode.FAST, DecodeMode.COMPILED})
#: Ways that decode one item after the other.
ONE_BY_ONE: Final = frozenset({DecodeMode.COMPILED, DecodeMode.LOW_MEMORY, DecodeMode.LEAN})


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What one call took."""

    mode: DecodeMode
    #: Decoded pixels of the call, all items together.
    pixels: int
    seconds: float
    #: Most memory above the weights; 0: not counted.
    peak_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """constant + slope · pixels."""

    constant: float
    slope: float

    def at(self, pixels: float) -> float:
        """Its value."""
        return self.constant + self.slope * pixels

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> Line:
        """The line of least relative squares through points (pixels, value); neither part below zero.

        Relative, since a decode of 64² counts as much as one of 512², which takes 64 times as long.
        """
        if not points:
            raise ValueError("a line needs a point")
        weights = [1 / value**2 if value > 0 else 0.0 for _, value in points]
        total = sum(weights)
        if total == 0:
            return cls(constant=0.0, slope=0.0)
        mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        product = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
        if spread == 0:
            return cls(constant=0.0, slope=mean_y / mean_x)
        slope = product / spread
        constant = mean_y - slope * mean_x
        if slope < 0:
            return cls(constant=mean_y, slope=0.0)
        if constant < 0:
            through = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True))
            return cls(constant=0.0, slope=through / sum(w * x * x for w, (x, _) in zip(weights, points, strict=True)))
        return cls(constant=constant, slope=slope)


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Seconds and bytes of calls of one VAE in one dtype on one device, by mode."""

    seconds: Mapping[DecodeMode, Line]
    #: Above the weights. Empty for a VAE of clips: what those take is no line (`for_item`).
    bytes: Mapping[DecodeMode, Line]

    @classmethod
    def fit(cls, probes: Sequence[Probe], *, bytes_known: Mapping[DecodeMode, Line] | None = None) -> CostModel:
        """Lines through the probes of each mode.

        Args:
            probes: measured calls.
            bytes_known: memory by arithmetic, where there is one; it is taken instead of what was measured.
        """
        known = dict(bytes_known or {})
        seconds: dict[DecodeMode, Line] = {}
        for mode in DecodeMode:
            of_mode = [probe for probe in probes if probe.mode is mode]
            if of_mode:
                seconds[mode] = Line.fit([(probe.pixels, probe.seconds) for probe in of_mode])
                counted = [(probe.pixels, float(probe.peak_bytes)) for probe in of_mode if probe.peak_bytes]
                if counted and mode not in known:
                    known[mode] = Line.fit(counted)
        return cls(seconds=seconds, bytes=known)

    def for_item(self, item_bytes: Mapping[DecodeMode, int], *, pixels: int) -> CostModel:
        """The same times, with memory as it is for items of one size.

        Args:
            item_bytes: what one item takes.
            pixels: of one item, over all its frames.
        """
        return replace(self, bytes={mode: Line(constant=0.0, slope=size / pixels) for mode, size in item_bytes.items()})

    def budget_px(self, mode: DecodeMode = DecodeMode.PLAIN, *, overhead_s: float = 0.0) -> int:
        """Decoded pixels past which a larger call is hardly faster for each of them.

        With t = constant + slope · P, the time for a pixel is slope + constant / P: within 5 % of what it can
        fall to from P = constant / (0.05 · slope) on. 0: one item a call, whatever its size.

        Args:
            mode: how it is decoded.
            overhead_s: what each call costs beside the decode; it counts with the constant.
        """
        line = self.seconds[mode]
        return int((line.constant + overhead_s) / (_WORTHWHILE * line.slope)) if line.slope > 0 else 0

    @property
    def for_batches(self) -> DecodeMode:
        """The way in which a large call of several items takes least time for a pixel."""
        usable = [mode for mode in (DecodeMode.PLAIN, DecodeMode.FAST) if mode in self.seconds]
        return min(usable, key=lambda mode: self.seconds[mode].slope)

    def items_that_fit(self, mode: DecodeMode, *, pixels_per_item: int, free_bytes: int) -> int:
        """Items whose call stays inside the free memory; 0 if one does not."""
        line = self.bytes.get(mode)
        if line is None:
            return 0
        room = free_bytes * _USABLE - line.constant
        if room < 0:
            return 0
        return int(room / (line.slope * pixels_per_item)) if line.slope > 0 else 1 << 30

    def to_wire(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            name: {str(mode): asdict(line) for mode, line in lines.items()}
            for name, lines in (("seconds", self.seconds), ("bytes", self.bytes))
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> CostModel:
        """What `to_wire` made."""
        lines = {
            name: {DecodeMode(mode): Line(**line) for mode, line in wire[name].items()} for name in ("seconds", "bytes")
        }
        return cls(seconds=lines["seconds"], bytes=lines["bytes"])


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """How a job is to be decoded."""

    mode: DecodeMode
    items_per_call: int
    #: All calls together.
    seconds: float
    #: Of one call, above the weights.
    peak_bytes: int
    #: Whether it fits the free memory by the model; otherwise it is the least that can be tried.
    fits: bool


def plan(
    model: CostModel,
    *,
    items: int,
    pixels_per_item: int,
    free_bytes: int,
    exact_bits: bool,
    tiling_allowed: bool = False,
    without: Collection[DecodeMode] = (),
) -> DecodePlan:
    """Chooses mode and items per call.

    Args:
        model: of the VAE.
        items: pictures or clips of the job.
        pixels_per_item: decoded pixels of one, over all its frames.
        free_bytes: memory there is.
        exact_bits: whether every bit must be the pipeline's: plain decode of all items at once, if it fits. Otherwise
            the fastest mode that fits is taken; plain if that is hardly slower.
        tiling_allowed: whether a decode that is not exact may be the last resort.
        without: modes that this job cannot have.
    """
    barred = set(without) | (FAST_MODES if exact_bits else set())
    modes = [mode for mode in DecodeMode if mode in model.seconds and mode not in barred]
    every = [_plan_of(model, mode, items, pixels_per_item, free_bytes) for mode in modes]
    good = [way for way in every if way.mode is not DecodeMode.TILED]
    fitting = [way for way in good if way.fits]
    plain = next((way for way in fitting if way.mode is DecodeMode.PLAIN), None)
    if exact_bits and plain is not None:
        return plain
    if fitting:
        fastest = min(fitting, key=lambda way: way.seconds)
        return fastest if plain is None or fastest.seconds < (1 - _NO_FASTER) * plain.seconds else plain
    tiled = [way for way in every if way.mode is DecodeMode.TILED and tiling_allowed]
    return min([*[way for way in tiled if way.fits], *good], key=lambda way: (not way.fits, way.peak_bytes))


def _plan_of(model: CostModel, mode: DecodeMode, items: int, pixels_per_item: int, free_bytes: int) -> DecodePlan:
    fit = model.items_that_fit(mode, pixels_per_item=pixels_per_item, free_bytes=free_bytes)
    per_call = max(1, min(items, fit))
    if mode in ONE_BY_ONE:
        per_call = 1
    calls, rest = divmod(items, per_call)
    seconds = calls * model.seconds[mode].at(per_call * pixels_per_item)
    seconds += model.seconds[mode].at(rest * pixels_per_item) if rest else 0.0
    line = model.bytes.get(mode)
    peak = math.ceil(line.at(per_call * pixels_per_item)) if line is not None else 0
    return DecodePlan(mode=mode, items_per_call=per_call, seconds=seconds, peak_bytes=peak, fits=fit >= 1)
