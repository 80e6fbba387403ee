"""How many jobs ended how, and how long that took: what the scripts count (`scripts/prelude.lua`, `tally`), read.

The counts are the broker's, so they are the same whichever process reads them, and outlive all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from broker_config import keys
from broker_config.answers import pipelined, text, time_ms
from broker_config.connection import Connections

#: Upper bounds of the histograms in ms; one more slot holds what is above the last.
BOUNDS_MS: Final = (10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 900_000)
#: What is timed.
TIMES: Final = ("wait", "decode", "encode")
OUTCOMES: Final = ("succeeded", "failed", "canceled")
QUARTER_S: Final = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How often something took how long."""

    #: Counts by slot of `BOUNDS_MS`, the last one for what is above; not cumulative.
    counts: tuple[int, ...]
    sum_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeTally:
    """Jobs of one VAE that ended, since the broker's data began."""

    vae: str
    outcomes: Mapping[str, int]
    times: Mapping[str, Histogram]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """Jobs that ended within a quarter of a minute."""

    #: Its begin, ms since the epoch by the broker's clock.
    from_ms: int
    outcomes: Mapping[str, int]
    #: Means over those that succeeded; None: none did.
    mean_s: Mapping[str, float | None]


class Tallies:
    """Reads the counts of one broker."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def of_vaes(self, vaes: Iterable[str]) -> list[VaeTally]:
        """Counts of each of these VAEs."""
        names = list(vaes)
        with pipelined(self._connections) as pipe:
            for vae in names:
                pipe.hgetall(keys.tally(vae))
            answers = pipe.execute()
        return [_vae_tally(vae, _numbers(raw)) for vae, raw in zip(names, answers, strict=True)]

    def pending_px(self) -> int:
        """Pixels of jobs that have not ended."""
        with pipelined(self._connections) as pipe:
            pipe.hget(keys.TOTALS, "px")
            (px,) = pipe.execute()
        return max(0, int(px or 0))

    def pulses(self, *, minutes: int) -> list[Pulse]:
        """The last minutes, oldest first, the running quarter included."""
        with pipelined(self._connections) as pipe:
            pipe.time()
            last = time_ms(pipe.execute()[0]) // (QUARTER_S * 1000)
            quarters = range(last - minutes * 60 // QUARTER_S + 1, last + 1)
            for quarter in quarters:
                pipe.hgetall(keys.pulse(quarter))
            answers = pipe.execute()
        return [_pulse(quarter, _numbers(raw)) for quarter, raw in zip(quarters, answers, strict=True)]


def _numbers(raw: Mapping[bytes, bytes]) -> dict[str, int]:
    return {text(name): int(value) for name, value in raw.items()}


def _vae_tally(vae: str, counts: Mapping[str, int]) -> VaeTally:
    return VaeTally(
        vae=vae,
        outcomes=_outcomes(counts),
        times={
            name: Histogram(
                counts=tuple(counts.get(f"{name}:{slot}", 0) for slot in range(1, len(BOUNDS_MS) + 2)),
                sum_s=counts.get(f"{name}:ms", 0) / 1000,
            )
            for name in TIMES
        },
    )


def _pulse(quarter: int, counts: Mapping[str, int]) -> Pulse:
    done = counts.get("succeeded", 0)
    return Pulse(
        from_ms=quarter * QUARTER_S * 1000,
        outcomes=_outcomes(counts),
        mean_s={name: counts.get(f"{name}:ms", 0) / 1000 / done if done else None for name in TIMES},
    )


def _outcomes(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in OUTCOMES}


def bounds_s() -> Sequence[float]:
    """The histograms' bounds in seconds."""
    return [bound / 1000 for bound in BOUNDS_MS]
