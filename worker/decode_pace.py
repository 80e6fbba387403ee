"""How long decodes take here, learned from those that were done: a device that needs many times as long hangs, and the
next batch is claimed when one is nearly through (`next_claim`).

A job's timeout says how long its submitter will wait, and is made for the slowest device there is; of a clip it may be
hours. A device that hangs should not keep its job for hours, so progress is due much earlier
(docs/decisions/0011-progress-not-time.md).
"""

from __future__ import annotations

import math
from typing import Final

#: A decode of half-precision output that is not finite runs again in float32, some ten times slower on a GPU.
_FACTOR: Final = 20.0
#: First calls compile kernels and load libraries, whatever the size.
_LEAST_S: Final = 60.0


class DecodePace:
    """The paces seen of each VAE and kind of job. For the device's thread."""

    def __init__(self) -> None:
        #: (VAE, kind) → least and most seconds a pixel, most pixels in one call.
        self._seen: dict[tuple[str, str], tuple[float, float, int]] = {}

    def learn(self, vae: str, kind: str, *, pixels: int, seconds: float) -> None:
        """Takes in how long one call took."""
        pace = seconds / pixels
        fastest, slowest, largest = self._seen.get((vae, kind), (math.inf, 0.0, 0))
        self._seen[vae, kind] = min(fastest, pace), max(slowest, pace), max(largest, pixels)

    def expected_s(self, vae: str, kind: str, *, pixels: int) -> float:
        """How long a call of so many pixels takes at the least; 0 where nothing was seen."""
        fastest, _, _ = self._seen.get((vae, kind), (0.0, 0.0, 0))
        return fastest * pixels

    def silence_s(self, vae: str, kind: str, *, pixels: int) -> float:
        """How long a call of so many pixels may say nothing before it hangs; infinite where nothing was seen.

        A call larger than any before may take quadratic time: the attention in the middle of most VAEs does.
        """
        _, slowest, largest = self._seen.get((vae, kind), (0.0, math.inf, 1))
        return max(_LEAST_S, _FACTOR * slowest * pixels * max(1.0, pixels / largest))
