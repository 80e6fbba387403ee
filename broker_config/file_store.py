"""Blobs as files of a folder that every process sees: a disk, or a network file system.

DESIGN. A blob is written to a temporary in the folder it will lie in, `fsync`ed, renamed, and the folder `fsync`ed:
before the rename nothing is visible under its name, after the last `fsync` a loss of power cannot take it. A process
killed in between leaves a temporary, which `drop_partial` removes. Everything happens below a descriptor of the root
that is opened once: a file system that is mounted over the folder, or goes away, cannot divert a write; and a write
is refused when the path no longer leads to that root. Links are not followed. Files are 0600 and folders 0700: all
processes that share a store run as one user.

Layout: `latentq-store.json`, and 256 folders named by the first byte of the name's sha256, made with the store.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from uuid import uuid4

from broker_config.errors import BlobStoreUnavailable, ConfigurationError
from broker_config.external_store import ID_NAME, Span, StoredBlob, check_name, id_from_bytes, id_to_bytes, is_name

_SHARDS: Final = tuple(f"{number:02x}" for number in range(256))
_PARTIAL_SUFFIX: Final = ".part"
#: Whether `access` can ask for the effective user (it cannot on every system).
_EFFECTIVE: Final = os.access in os.supports_effective_ids
_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class FileStore:
    """An `ExternalStore` in a folder."""

    def __init__(self, root: Path) -> None:
        self._path = root
        self._lock = threading.Lock()
        self._root: int | None = None
        self._closing: weakref.finalize[[int], FileStore] | None = None

    @property
    def url(self) -> str:
        """`file:///folder`."""
        return self._path.as_uri()

    def close(self) -> None:
        """Closes the root."""
        with self._lock:
            if self._closing is not None:
                self._closing()
            self._root = self._closing = None

    # The store's id -------------------------------------------------------------------------------------

    def read_id(self) -> str | None:
        """The id of the store in this folder; None: no folder, or none of ours.

        Raises:
            ConfigurationError: not a folder, not readable and writable for this user, or a damaged id.
        """
        with self._setup_errors():
            try:
                root = self._open_root()
                data = _read(root, ID_NAME)
            except FileNotFoundError:
                return None
            if not os.access(".", os.R_OK | os.W_OK | os.X_OK, dir_fd=root, effective_ids=_EFFECTIVE):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return id_from_bytes(data, url=self.url)

    def create_id(self, store_id: str) -> None:
        """Makes the folder, its shards, and the id, which appears whole or not at all; the first one stays.

        Raises:
            ConfigurationError: this user may not.
        """
        with self._setup_errors():
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            root = self._open_root()
            for shard in _SHARDS:
                _make_folder(root, shard)
            temporary = _partial_name(ID_NAME)
            _write(root, temporary, id_to_bytes(store_id))
            try:
                # A link, unlike a rename, does not replace what someone else was faster to put there.
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, ID_NAME, src_dir_fd=root, dst_dir_fd=root)
            finally:
                os.unlink(temporary, dir_fd=root)
            os.fsync(root)

    # Blobs ----------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> None:
        """Stores `data` under `name`; when this returns it is on disk.

        Raises:
            BlobStoreUnavailable: the file system refused; nothing is visible, or all of it is.
        """
        check_name(name)
        with self._errors("written"):
            self._check_in_place()
            with self._shard_of(name, create=True) as shard:
                temporary = _partial_name(name)
                try:
                    _write(shard, temporary, data)
                    os.rename(temporary, name, src_dir_fd=shard, dst_dir_fd=shard)
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(temporary, dir_fd=shard)
                    raise
                os.fsync(shard)

    def read(self, name: str, span: Span | None = None) -> bytes | None:
        """The bytes under `name`, or those in `span`; None: there are none."""
        check_name(name)
        with self._errors("read"):
            try:
                with self._shard_of(name) as shard:
                    return _read(shard, name, span)
            except FileNotFoundError:
                return None

    def link(self, name: str, *, lifetime_s: float) -> str | None:
        """None: nobody outside can read a folder."""
        return None

    def delete(self, names: Sequence[str]) -> None:
        """Removes these files. Not `fsync`ed: what a loss of power brings back, the next walk removes."""
        for name in names:
            check_name(name)
            with self._errors("deleted from"), contextlib.suppress(FileNotFoundError), self._shard_of(name) as shard:
                os.unlink(name, dir_fd=shard)

    def listing(self) -> Iterator[StoredBlob]:
        """Every blob, shard by shard."""
        for shard in _SHARDS:
            for name, status in self._files_of(shard):
                if is_name(name):
                    yield StoredBlob(name=name, age_s=time.time() - status.st_mtime)

    def drop_partial(self, *, older_than_s: float) -> int:
        """Removes temporaries of writers that died. A writer that merely slept gets an error and writes again."""
        count = 0
        for shard in (".", *_SHARDS):
            for name, status in self._files_of(shard):
                if _is_partial(name) and time.time() - status.st_mtime > older_than_s:
                    with self._errors("deleted from"), contextlib.suppress(FileNotFoundError):
                        os.unlink(f"{shard}/{name}", dir_fd=self._open_root())
                        count += 1
        return count

    # Inside ---------------------------------------------------------------------------------------------

    def _files_of(self, shard: str) -> list[tuple[str, os.stat_result]]:
        found = []
        with self._errors("listed"), contextlib.suppress(FileNotFoundError):
            folder = os.open(shard, _FOLDER_FLAGS, dir_fd=self._open_root())
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):  # deleted since
                            status = entry.stat(follow_symlinks=False)
                            if stat.S_ISREG(status.st_mode):
                                found.append((entry.name, status))
            finally:
                os.close(folder)
        return found

    def _open_root(self) -> int:
        with self._lock:
            if self._root is None:
                self._root = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                self._closing = weakref.finalize(self, os.close, self._root)
            return self._root

    def _check_in_place(self) -> None:
        """The path must still lead to the root that was opened."""
        there, ours = os.stat(self._path), os.fstat(self._open_root())
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise OSError(errno.ESTALE, "the folder was replaced, or something was mounted over it, since the start")

    @contextlib.contextmanager
    def _shard_of(self, name: str, *, create: bool = False) -> Iterator[int]:
        shard = hashlib.sha256(name.encode()).hexdigest()[:2]
        root = self._open_root()
        try:
            folder = os.open(shard, _FOLDER_FLAGS, dir_fd=root)
        except FileNotFoundError:
            if not create:
                raise
            _make_folder(root, shard)
            os.fsync(root)
            folder = os.open(shard, _FOLDER_FLAGS, dir_fd=root)
        try:
            yield folder
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BlobStoreUnavailable(
                f"the blob store {self.url} cannot be {doing} ({error.strerror or error}): check that the folder is "
                "mounted, that this user may write there, and that the disk is not full"
            ) from error

    @contextlib.contextmanager
    def _setup_errors(self) -> Iterator[None]:
        try:
            yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise ConfigurationError(
                f"the blob store {self.url} is not usable ({error.strerror or error}): LATENTQ_BLOB_STORE must name a "
                "folder that this user may read and write"
            ) from error
        except OSError as error:
            raise BlobStoreUnavailable(
                f"the blob store {self.url} does not answer ({error.strerror or error}): check that it is mounted"
            ) from error


def _partial_name(name: str) -> str:
    return f".{name}.{uuid4().hex[:8]}{_PARTIAL_SUFFIX}"


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(_PARTIAL_SUFFIX)


def _make_folder(root: int, name: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=root)


def _write(folder: int, name: str, data: bytes) -> None:
    """A new file with `data`, on disk."""
    file = os.open(name, _WRITE_FLAGS, 0o600, dir_fd=folder)
    try:
        left = memoryview(data)
        while left:  # one call writes at most 2 GiB
            left = left[os.write(file, left) :]
        os.fsync(file)
    finally:
        os.close(file)


def _read(folder: int, name: str, span: Span | None = None) -> bytes:
    file = os.open(name, _READ_FLAGS, dir_fd=folder)
    with open(file, "rb", buffering=0) as stream:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file")
        if span is None:
            return stream.readall()
        found = []
        at, end = span
        while at < end and (piece := os.pread(file, end - at, at)):  # at most 2 GiB at a time
            found.append(piece)
            at += len(piece)
        return b"".join(found)
