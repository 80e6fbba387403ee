"""The embedded broker of `latentq up`, kept running: a server that ended is started again, with the same data and URL.

Nobody else can do it: whoever runs `latentq up` holds the folder. Workers and all others wait for the broker meanwhile.
"""

from __future__ import annotations

import logging
import time

from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import LatentqError
from producer.supervisor import PAUSE_FIRST_S, next_pause_s

logger = logging.getLogger(__name__)


class KeptBroker:
    """Starts a broker again whose server has ended. Not thread-safe: call it from one thread, the broker's."""

    def __init__(self, broker: EmbeddedBroker) -> None:
        """Args:
        broker: it runs.
        """
        self._broker = broker
        self._started = time.monotonic()
        self._pause_s = PAUSE_FIRST_S
        #: None: it is not known to have ended.
        self._restart_at: float | None = None

    def check(self) -> None:
        """Starts the server again if it ended, after a pause. Takes as long as it takes to read its data."""
        now = time.monotonic()
        if self._restart_at is not None:
            if now >= self._restart_at:
                self._start_again()
            return
        status = self._broker.ended()
        if status is None:
            return
        self._pause(lived_s=now - self._started)
        logger.warning(
            "the broker ended with status %d, starting it again in %.1f s",
            status,
            self._pause_s,
            extra={"action": "child_ended", "child": "broker", "status": status},
        )

    def _start_again(self) -> None:
        try:
            self._broker.start()
        except LatentqError as error:
            self._pause(lived_s=0)
            logger.error(
                "the broker does not start, trying again in %.1f s: %s",
                self._pause_s,
                error,
                extra={"action": "broker_start_failed"},
            )
            return
        self._started, self._restart_at = time.monotonic(), None

    def _pause(self, *, lived_s: float) -> None:
        self._pause_s = next_pause_s(self._pause_s, lived_s=lived_s)
        self._restart_at = time.monotonic() + self._pause_s
