"""The manifest of a run: one line of JSON for each finished picture, on disk before the picture counts as finished.

DESIGN. A line is appended with one write and `fsync`ed. A process that was killed, or a machine that lost power, in
that moment leaves a torn last line: it has no line feed at its end, or holds what is no JSON. It is cut off when the
manifest is opened, and its picture is fetched again, which the queue still has: results are freed after their line is
on disk. One process writes to a manifest; a second one is refused by a lock that ends with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from broker_config.errors import ConfigurationError
from producer.prompt_farm.destination import sync_folder


class Manifest:
    """The lines of one run. Thread-safe."""

    def __init__(self, path: Path, *, copy: bytes | None = None) -> None:
        """Args:
        path: the file; made if need be, with its folder.
        copy: what is known of the run from elsewhere; its lines of tasks that have none here are added.

        Raises:
            ConfigurationError: cannot be written, is written by another process, or is damaged before its last line.
        """
        self._path = path
        self._lock = threading.Lock()
        #: Job id of each task → its line.
        self.rows: dict[str, Mapping[str, Any]] = {}
        #: Bytes of a torn last line that were cut off.
        self.torn_bytes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            if is_new:
                sync_folder(path.parent)
        except OSError as error:
            raise ConfigurationError(f"the manifest {path} cannot be written: {error.strerror or error}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ConfigurationError(f"another run writes to {path}: wait for it, or name another folder") from None
        try:
            self._load()
            self._merge(copy or b"")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the lock."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a line; when this returns it is on disk.

        Raises:
            OSError: the disk is full or gone; the file is as it was.
        """
        line = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            end = os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) != len(line):
                    raise OSError("the line was written in part: the disk is full")
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, end)  # the next line must not begin in the middle of this one
                raise
            self.rows[row["job_id"]] = row

    def data(self) -> bytes:
        """The whole file."""
        return self._path.read_bytes()

    def _load(self) -> None:
        data = self._path.read_bytes()
        whole = 0
        for job_id, row, line in _lines(data, what=str(self._path)):
            self.rows[job_id] = row
            whole += len(line) + 1
        self.torn_bytes = len(data) - whole
        if self.torn_bytes:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)

    def _merge(self, copy: bytes) -> None:
        """Adds the lines of another manifest that this one lacks: another machine may have written them."""
        found = {job_id: (row, line) for job_id, row, line in _lines(copy, what="the copy of the manifest")}
        missing = {job_id: both for job_id, both in found.items() if job_id not in self.rows}
        if not missing:
            return
        data = b"".join(line + b"\n" for _, line in missing.values())
        try:
            if os.write(self._file, data) != len(data):
                raise OSError("it was written in part: the disk is full")
            os.fsync(self._file)
        except OSError as error:  # a torn last line is cut off by the next run
            raise ConfigurationError(f"the manifest {self._path} cannot be written: {error}") from None
        self.rows |= {job_id: row for job_id, (row, _) in missing.items()}


def _lines(data: bytes, *, what: str) -> Iterator[tuple[str, Mapping[str, Any], bytes]]:
    """Each line but a torn last one: the task's job id, what it says, and its bytes.

    Raises:
        ConfigurationError: another line is damaged.
    """
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            job_id = row["job_id"]
        except (ValueError, TypeError, KeyError):
            if any(rest.strip(b"\0 ") for rest in lines[number:]):
                raise ConfigurationError(
                    f"line {number} of the manifest {what} is damaged: mend or remove it"
                ) from None
            return
        yield job_id, row, line
