"""The spool: a folder in which submits wait that the broker did not take.

One safetensors file for each job: its latents (of an encode: its pictures) as the only tensor, and the job's whole
message in the file's metadata, with a digest. So a file says everything a submit needs, and whether it is damaged.

DESIGN. A job is in the spool once `keep` returns: the file was written beside, synced, renamed, and its folder synced.
It leaves by `discard`, after the broker has accepted it, or by `set_aside`, if it never will. A process may be killed
between any two lines: before the rename there is a temporary, which nobody was promised anything about; after it, the
file stays until some flush has handed it over, and handing it over twice is handing it over once, since the job's id
and payload hash are in the message. The name has both, so two processes that keep one job write the same file.

Several processes may use one folder. Who hands a file over holds a lock on it, which saves work and is not what makes
it safe. No network file system is asked for more than rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from uuid import uuid4

from broker_config.errors import ConfigurationError, InvalidJob, SpoolFileDamaged, SpoolUnavailable
from broker_config.messages import DecodeRequest
from broker_config.tensor_header import memory_order, order_metadata, read_header, write_header
from producer.tensor_input import TensorFile

_MESSAGE: Final = "latentq.message"
_SECRETS: Final = "latentq.webhook_secrets"
_DIGEST: Final = "latentq.message_sha256"
_SUFFIX: Final = ".safetensors"
_TEMPORARY: Final = ".part"
_ASIDE: Final = "aside"
#: A temporary this old belongs to no live writer: the slowest takes seconds.
_STALE_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SpoolEntry:
    """One file of the spool, as its name and the file system tell."""

    job_id: str
    path: Path
    size_bytes: int
    #: Seconds since the epoch: when it was kept.
    kept_s: float
    #: Whether it was set aside; otherwise it waits to be handed over.
    aside: bool = False
    #: Why it was set aside, where that is known.
    reason: str | None = None


class KeptJob(NamedTuple):
    """What a file of the spool holds."""

    request: DecodeRequest
    tensor: TensorFile
    #: Of its webhook.
    secrets: tuple[str, ...]


class Spool:
    """The files of one folder. Thread-safe, and safe for several processes."""

    def __init__(self, folder: Path | str) -> None:
        """Args:
        folder: made if need be, readable for this user only: latents and prompts lie in it.

        Raises:
            ConfigurationError: it cannot be made or written to.
        """
        self.folder = Path(folder)
        self._aside = self.folder / _ASIDE
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._aside.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"the spool folder {self.folder} cannot be made: {error.strerror}") from error
        if not os.access(self.folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigurationError(f"the spool folder {self.folder} is not writable for this user")

    def keep(self, request: DecodeRequest, tensor: TensorFile, *, secrets: Sequence[str] = ()) -> Path:
        """Writes a job down; when this returns it is on disk. The same job again changes nothing.

        Args:
            request: the job.
            tensor: its latents or pictures.
            secrets: of its webhook; no part of the message.

        Raises:
            SpoolUnavailable: the folder did not take it, the disk is full for example; nothing of it is left there.
        """
        path = self.folder / f"{request.job_id}.{request.payload_hash[:16]}{_SUFFIX}"
        temporary = self.folder / f".{request.job_id}.{uuid4().hex}{_TEMPORARY}"
        try:
            if not path.exists():
                try:
                    _write(temporary, request, tensor, secrets)
                    os.rename(temporary, path)
                except BaseException:
                    with contextlib.suppress(OSError):
                        temporary.unlink()
                    raise
            _sync(self.folder)
        except OSError as error:
            raise SpoolUnavailable(
                f"the spool {self.folder} did not take job {request.job_id} ({error.strerror}): free its disk, or name "
                "another folder with LATENTQ_SPOOL_DIR",
                job_id=request.job_id,
            ) from error
        return path

    def entries(self) -> list[SpoolEntry]:
        """What waits to be handed over, oldest first."""
        return _entries(self.folder, aside=False)

    def aside(self) -> list[SpoolEntry]:
        """What was set aside, with the reason."""
        return _entries(self._aside, aside=True)

    def is_empty(self) -> bool:
        """Whether nothing waits."""
        with os.scandir(self.folder) as files:
            return not any(item.name.endswith(_SUFFIX) for item in files)

    def holds(self, job_ids: Collection[str]) -> set[str]:
        """Those of `job_ids` that wait here."""
        if not job_ids:
            return set()
        with os.scandir(self.folder) as files:
            return {item.name.partition(".")[0] for item in files if item.name.endswith(_SUFFIX)} & set(job_ids)

    @contextlib.contextmanager
    def claimed(self, entry: SpoolEntry) -> Iterator[bool]:
        """Whether this caller is the one to hand the file over, inside the block; False: another has it, or had it."""
        try:
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield False
            return
        except OSError:  # `read` will say what is wrong with it
            yield True
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = entry.path.exists()
            except BlockingIOError:
                mine = False
            except OSError:  # a file system without locks: handing over twice does no harm
                mine = True
            yield mine
        finally:
            os.close(descriptor)

    def read(self, entry: SpoolEntry) -> KeptJob:
        """The job in a file, as it was kept.

        Raises:
            SpoolFileDamaged: it is not what was written.
            UnsupportedMessage: a newer latentq wrote it.
        """
        try:
            data = entry.path.read_bytes()
            header = read_header(data)
            message = header.metadata[_MESSAGE].encode()
            signing = header.metadata[_SECRETS]
            digest = header.metadata[_DIGEST]
        except (InvalidJob, KeyError, UnicodeError) as error:
            raise SpoolFileDamaged(f"{entry.path.name} is damaged: {error}", job_id=entry.job_id) from error
        except OSError as error:
            reason = f"{entry.path.name} cannot be read: {error.strerror}"
            raise SpoolFileDamaged(reason, job_id=entry.job_id) from error
        if _digest(message, signing) != digest:
            raise SpoolFileDamaged(f"{entry.path.name} is damaged: its message has changed", job_id=entry.job_id)
        request = DecodeRequest.from_wire(message)
        raw = memoryview(data)[header.data_start :]
        order = memory_order(header)
        blob = write_header(header.dtype, header.shape, order_metadata(order)) + raw
        if hashlib.sha256(blob).hexdigest() != request.latents.sha256:
            raise SpoolFileDamaged(f"{entry.path.name} is damaged: its latents have changed", job_id=entry.job_id)
        tensor = TensorFile(dtype=header.dtype, shape=header.shape, raw=lambda: raw, order=order)
        return KeptJob(request, tensor, tuple(json.loads(signing)))

    def discard(self, entry: SpoolEntry) -> None:
        """Removes a file whose job the broker has. Not synced: what comes back after a loss of power is sent again."""
        entry.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def withdrawn(self, job_id: str) -> Iterator[bool]:
        """Takes a job out of the spool once the block ends without an error. Yields whether it is there.

        Nobody hands it over meanwhile; a handing-over that is under way is waited for.
        """
        with contextlib.ExitStack() as held:
            mine = []
            for entry in self.entries():
                path = entry.path
                if entry.job_id != job_id:
                    continue
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                held.callback(os.close, descriptor)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                if path.exists():
                    mine.append(path)
            yield bool(mine)
            for path in mine:
                path.unlink(missing_ok=True)
            if mine:
                _sync(self.folder)

    def set_aside(self, entry: SpoolEntry, reason: str) -> Path:
        """Moves a file that will never be taken out of the way, with the reason beside it. Nothing is deleted."""
        target = self._aside / entry.path.name
        with contextlib.suppress(OSError):  # a full disk: the file itself still moves
            _reason_file(target).write_text(reason + "\n", encoding="utf-8")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(entry.path, target)
            _sync(self._aside)
            _sync(self.folder)
        return target

    def sweep(self) -> int:
        """Removes what killed writers left half-written. Returns how many."""
        removed = 0
        for path in self.folder.glob(f".*{_TEMPORARY}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()
                    removed += 1
        return removed


def _write(path: Path, request: DecodeRequest, tensor: TensorFile, secrets: Sequence[str]) -> None:
    message, signing = request.to_wire(), json.dumps(list(secrets))
    metadata = {_MESSAGE: message.decode(), _SECRETS: signing, _DIGEST: _digest(message, signing)}
    blob = memoryview(tensor.data)
    header = read_header(blob)
    metadata |= order_metadata(memory_order(header))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(write_header(tensor.dtype, tensor.shape, metadata))
        file.write(blob[header.data_start :])
        file.flush()
        os.fsync(file.fileno())


def _digest(message: bytes, signing: str) -> str:
    return hashlib.sha256(message + b"\n" + signing.encode()).hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path, *, aside: bool) -> list[SpoolEntry]:
    found = []
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # handed over meanwhile
            continue
        reason = _reason_file(path)
        found.append(
            SpoolEntry(
                job_id=path.name.partition(".")[0],
                path=path,
                size_bytes=facts.st_size,
                kept_s=facts.st_mtime,
                aside=aside,
                reason=reason.read_text(encoding="utf-8").strip() if reason.exists() else None,
            )
        )
    return sorted(found, key=lambda entry: (entry.kept_s, entry.path.name))


def _reason_file(path: Path) -> Path:
    return path.with_suffix(".txt")
