"""When a worker claims its next batch: early enough that the device never waits for it, and no earlier.

A claimed batch waits for this device alone. Claimed as soon as the device takes the one before, it would wait out a
clip of minutes while other workers idle, and jobs of a higher priority that come meanwhile would come after it. So a
long decode is nearly over before the next claim; where it cannot be foreseen how long it takes, or a VAE may have to be
loaded first, the claim is made at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

#: How long before the expected end of a decode the next claim is made, besides what preparing a batch takes.
_AHEAD_S: Final = 1.0
#: Preparing the next batch may take so many times as long as the slowest of late.
_MARGIN: Final = 2.0
#: How many batches are of late.
_OF_LATE: Final = 16


class NextClaim:
    """One permission to claim at a time. The fetch stage waits for it, the device stage gives it."""

    def __init__(
        self, *, may_load: Callable[[], bool] = lambda: False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args:
        may_load: whether the next batch may need a VAE that is not loaded.
        clock: seconds, monotonic.
        """
        self._may_load = may_load
        self._clock = clock
        self._changed = threading.Condition()
        self._permitted = True
        self._not_before = 0.0
        self._prepared_s: deque[float] = deque(maxlen=_OF_LATE)

    def prepared(self, seconds: float) -> None:
        """Takes in how long a batch took from its claim until it was ready."""
        self._prepared_s.append(seconds)

    def taken(self, *, expected_s: float) -> None:
        """The device took the batch that was ready, and expects to need so long for it."""
        wait_s = 0.0
        if not self._may_load():
            wait_s = expected_s - _AHEAD_S - _MARGIN * max(self._prepared_s, default=0.0)
        with self._changed:
            self._permitted = True
            self._not_before = self._clock() + wait_s
            self._changed.notify()

    def device_is_free(self) -> None:
        """The device has nothing to do: whatever was expected, now is the time."""
        with self._changed:
            self._not_before = 0.0
            self._changed.notify()

    def wait(self, timeout_s: float) -> bool:
        """Takes the permission. Returns whether it came in time."""
        end = self._clock() + timeout_s
        with self._changed:
            while not (self._permitted and self._clock() >= self._not_before):
                left_s = end - self._clock()
                if left_s <= 0:
                    return False
                if self._permitted:
                    left_s = min(left_s, max(0.0, self._not_before - self._clock()))
                self._changed.wait(left_s)
            self._permitted = False
            return True
