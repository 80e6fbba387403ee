"""Who waits for which job, in one process: one subscription wakes all of them.

DESIGN. A thread of its own listens on the channel that the broker's scripts publish the id of each ended job on, and
hands the ids to the event loop; so a thousand waits cost one connection, and no thread each. What is published while
nobody is subscribed is lost, so nothing depends on it: everyone looks once after the subscription has begun (again),
and every few seconds besides, more often while there is no subscription. Not thread-safe: call it from its loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from redis.exceptions import RedisError

from broker_config import keys
from broker_config.connection import Connections

#: Who waits looks this often, whatever it hears.
LOOK_EVERY_S: Final = 10.0
#: The same while nothing can be heard.
LOOK_EVERY_DEAF_S: Final = 1.0
_LISTEN_S: Final = 0.5
_RECONNECT_S: Final = 0.5


class Watch:
    """Some jobs, and which of them are said to have ended."""

    def __init__(self) -> None:
        #: Set when there is reason to look.
        self.rung = asyncio.Event()
        #: Ids that were heard of.
        self.ended: set[str] = set()


class EndedFeed:
    """The subscription of one event loop."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._watches: dict[str, set[Watch]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._listening = False

    @property
    def look_every_s(self) -> float:
        """How long a wait may rely on being rung."""
        return LOOK_EVERY_S if self._listening else LOOK_EVERY_DEAF_S

    @contextlib.contextmanager
    def watching(self, *job_ids: str) -> Iterator[Watch]:
        """A watch over these jobs. Look at them once after this has begun: what ended before rings nobody."""
        self._start()
        watch = Watch()
        for job_id in job_ids:
            self._watches.setdefault(job_id, set()).add(watch)
        try:
            yield watch
        finally:
            for job_id in job_ids:
                others = self._watches[job_id]
                others.discard(watch)
                if not others:
                    del self._watches[job_id]

    def close(self) -> None:
        """Ends the subscription; blocks for up to a second."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * _LISTEN_S)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop:
            raise RuntimeError("an asynchronous client belongs to one event loop: make another one for this loop")
        if self._thread is None:
            self._loop = loop
            self._thread = threading.Thread(target=self._listen, name="ended-feed", daemon=True)
            self._thread.start()

    # In the loop ----------------------------------------------------------------------------------------

    def _heard(self, job_id: str) -> None:
        for watch in self._watches.get(job_id, ()):
            watch.ended.add(job_id)
            watch.rung.set()

    def _set_listening(self, listening: bool) -> None:
        self._listening = listening
        for watches in self._watches.values():
            for watch in watches:
                watch.rung.set()

    # In the thread --------------------------------------------------------------------------------------

    def _listen(self) -> None:
        while not self._closing.is_set():
            pubsub = self._connections.commands.pubsub()
            try:
                pubsub.subscribe(keys.ENDED_CHANNEL)
                while not self._closing.is_set():
                    message = pubsub.get_message(timeout=_LISTEN_S)
                    if message is None:
                        continue
                    if message["type"] == "subscribe":
                        self._tell(self._set_listening, True)
                    elif message["type"] == "message":
                        self._tell(self._heard, message["data"].decode())
            except (RedisError, OSError, TypeError):  # redis-py trips over its own None when cut while it subscribes
                self._tell(self._set_listening, False)
                self._closing.wait(_RECONNECT_S)
            finally:
                pubsub.close()

    def _tell(self, what: object, argument: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(what, argument)  # type: ignore[arg-type]
