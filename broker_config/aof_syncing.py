"""Syncs an append-only file once a second, from outside the server that writes it.

A server with `appendfsync everysec` keeps what comes during an fsync in memory and answers all the same, so SIGKILL
loses it; one with `no` always writes before it answers, and leaves the fsync to the system. With this beside it, a
killed server loses nothing, and a loss of power the last second: docs/decisions/0010-what-a-killed-broker-keeps.md.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_EVERY_S: Final = 1.0


class AofSyncing:
    """A thread that syncs the files of one server's append-only folder until it is stopped."""

    def __init__(self, folder: Path, *, every_s: float = _EVERY_S) -> None:
        """Args:
        folder: `appendonlydir`; the files in it change with each rewrite.
        every_s: pause between two rounds.
        """
        self._folder = folder
        self._every_s = every_s
        self._stop = threading.Event()
        self._seen: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="aof-sync", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, after the round under way."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            try:
                self.sync()
            except OSError as error:  # the folder itself
                _log_failed(self._folder, error)

    def sync(self) -> list[str]:
        """Syncs every file that has grown since the last time. Returns their names.

        One that cannot be synced is logged and tried again in the next round; it stops no other.
        """
        grown = []
        for path in sorted(self._folder.glob("*")):
            try:
                size = path.stat().st_size
                if self._seen.get(path.name) == size:
                    continue
                _sync(path)
            except FileNotFoundError:  # a rewrite takes files away; the next round sees the new ones
                logger.debug("%s went away while it was synced", path, extra={"action": "aof_not_synced"})
            except OSError as error:
                _log_failed(path, error)
            else:
                self._seen[path.name] = size
                grown.append(path.name)
        return grown


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _log_failed(path: Path, error: OSError) -> None:
    logger.error(
        "%s could not be synced, so a loss of power may lose what is in it: %s",
        path,
        error,
        extra={"action": "aof_sync_failed"},
    )
