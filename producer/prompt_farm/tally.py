"""Counts and times of a run, and what they say of the overlap of denoising and decoding.

W is the wall time from the first call of the pipeline to the last result; D the seconds in which the busiest device
denoised; V the seconds in which the busiest worker decoded and encoded, added up from what it records with each job. If
nothing overlapped, W would be D + V, and if everything did, the larger of the two: the overlap ratio
(D + V - W) / min(D, V) is 0 there and 1 here.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Final

from producer.prompt_farm.events import Denoised
from producer.prompt_farm.results import FarmResult

#: Rates are those of the last so many.
_RECENT: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """The figures of a run, seconds."""

    wall_s: float
    denoise_s: float
    decode_s: float

    @property
    def ratio(self) -> float | None:
        """Share of the shorter part that cost no time; None: there was nothing to overlap."""
        shorter = min(self.denoise_s, self.decode_s)
        return (self.denoise_s + self.decode_s - self.wall_s) / shorter if shorter > 0 else None

    @property
    def speed_up(self) -> float | None:
        """How much longer one after the other would have taken."""
        return (self.denoise_s + self.decode_s) / self.wall_s if self.wall_s > 0 else None

    @property
    def bound(self) -> float | None:
        """The speed-up if everything overlapped."""
        longer = max(self.denoise_s, self.decode_s)
        return (self.denoise_s + self.decode_s) / longer if longer > 0 else None


class Tally:
    """Counts what happens in a run. For one thread."""

    def __init__(self, *, total: int, finished: int, adopted: int) -> None:
        """Args:
        total: tasks of the run.
        finished: of them, those that an earlier run has brought home.
        adopted: of them, those that an earlier run has submitted.
        """
        self.total = total
        self.finished_before = finished
        self.adopted = adopted
        self.denoised = 0
        self.saved = 0
        self.failed = 0
        self._denoise_s: defaultdict[str, float] = defaultdict(float)
        self._decode_s: defaultdict[str, float] = defaultdict(float)
        self._began_s: float | None = None
        self._last_s: float | None = None
        self._denoised_at: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._saved_at: deque[float] = deque(maxlen=_RECENT)

    def denoise(self, event: Denoised) -> None:
        """A call of a pipeline."""
        self.denoised += len(event.tasks)
        self._denoise_s[event.device] += event.seconds
        began = event.began_s
        self._began_s = began if self._began_s is None else min(began, self._began_s)
        self._denoised_at.append((began + event.seconds, len(event.tasks)))

    def save(self, result: FarmResult) -> None:
        """A result that is safe."""
        self.saved += 1
        self._last_s = time.monotonic()
        self._saved_at.append(self._last_s)
        if result.timings_s.get("denoise") is not None:
            seconds = (result.timings_s.get("decode") or 0.0) + (result.timings_s.get("encode") or 0.0)
            self._decode_s[result.worker or ""] += seconds

    def fail(self) -> None:
        """A task that came to nothing."""
        self.failed += 1

    @property
    def left(self) -> int:
        """Tasks of which nothing is known yet."""
        return self.total - self.finished_before - self.saved - self.failed

    @property
    def overlap(self) -> Overlap | None:
        """The figures; None: nothing was denoised and decoded, or workers also decoded what an earlier run denoised."""
        if self._began_s is None or self._last_s is None or self.adopted:
            return None
        return Overlap(
            wall_s=self._last_s - self._began_s,
            denoise_s=max(self._denoise_s.values(), default=0.0),
            decode_s=max(self._decode_s.values(), default=0.0),
        )

    @property
    def denoise_rate(self) -> float | None:
        """Tasks a second, lately."""
        if len(self._denoised_at) < 2:
            return None
        span = self._denoised_at[-1][0] - self._denoised_at[0][0]
        return sum(count for _, count in list(self._denoised_at)[1:]) / span if span > 0 else None

    @property
    def save_rate(self) -> float | None:
        """Results a second, lately."""
        if len(self._saved_at) < 2:
            return None
        span = self._saved_at[-1] - self._saved_at[0]
        return (len(self._saved_at) - 1) / span if span > 0 else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the end at the present rates; None: not known yet."""
        if self.left == 0:
            return 0.0
        times = []
        to_denoise = self.total - self.finished_before - self.adopted - self.denoised - self.failed
        if to_denoise > 0:
            if self.denoise_rate is None:
                return None
            times.append(to_denoise / self.denoise_rate)
        if self.save_rate is None:
            return None
        times.append(self.left / self.save_rate)
        return max(times)
