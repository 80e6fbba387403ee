"""Where a run's files go: a folder, or a bucket. A file is there whole or not at all, and on disk when `write` returns.

A folder's files are written beside their final place, `fsync`ed and renamed; a bucket's service acknowledges an object
as a whole. The manifest of a bucket lies on this machine, since objects cannot be appended to, and a copy of it is
stored in the bucket from time to time (`manifest.py` reads the newer one).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol
from uuid import uuid4

from broker_config.bucket import Bucket
from broker_config.errors import BlobStoreUnavailable, ConfigurationError
from broker_config.external_store import StoreUrl

if TYPE_CHECKING:
    from broker_config.settings import Settings

MANIFEST_NAME: Final = "manifest.jsonl"
_PROBE: Final = ".latentq-write-test"
#: So many files of a bucket are asked for one by one; of more, all there are, are listed.
_FEW: Final = 8


class Destination(Protocol):
    """A place for files under names with `/`. Thread-safe.

    Raises, from every method:
        BlobStoreUnavailable: the place does not do what it should; the same call may succeed later.
    """

    @property
    def url(self) -> str:
        """For people, without credentials."""
        ...

    @property
    def manifest(self) -> Path:
        """Where the run's manifest lies on this machine."""
        ...

    def check(self) -> None:
        """Raises ConfigurationError unless files can be written."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Stores a file; when this returns, it is safe."""
        ...

    def present(self, names: Collection[str]) -> set[str]:
        """Those of these files that are there."""
        ...

    def read_copy(self) -> bytes | None:
        """The copy of the manifest that lies there, if that is another file than `manifest`."""
        ...

    def keep_copy(self, data: bytes) -> None:
        """Stores a copy of the manifest there, unless it is there anyway."""
        ...


def open_destination(out: str, settings: Settings) -> Destination:
    """The place that `--out` names: a folder, `file:///folder`, or `s3://bucket/prefix`.

    Raises:
        ConfigurationError: not such a place.
    """
    if "://" not in out:
        return Folder(Path(out).expanduser())
    try:
        target = StoreUrl.parse(out)
    except ValueError as error:
        raise ConfigurationError(f"out {out!r} cannot be used: {error}", field="out") from None
    if target.folder is not None:
        return Folder(target.folder)
    return BucketFolder(target, settings)


class Folder:
    """A `Destination` on a file system."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()

    @property
    def url(self) -> str:
        return str(self._path)

    @property
    def manifest(self) -> Path:
        return self._path / MANIFEST_NAME

    def check(self) -> None:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            write_durably(self._path / _PROBE, b"")
            (self._path / _PROBE).unlink()
        except OSError as error:
            raise ConfigurationError(
                f"the folder {self._path} cannot be written: {error.strerror or error}", field="out"
            ) from None

    def write(self, name: str, data: bytes) -> None:
        path = self._path / name
        try:
            _make_folders(path.parent, below=self._path)
            write_durably(path, data)
        except OSError as error:
            raise BlobStoreUnavailable(
                f"{path} cannot be written ({error.strerror or error}): check that the folder is there, that this user "
                "may write to it, and that the disk is not full"
            ) from error

    def present(self, names: Collection[str]) -> set[str]:
        return {name for name in names if (self._path / name).is_file()}

    def read_copy(self) -> bytes | None:
        return None

    def keep_copy(self, data: bytes) -> None:
        return None


class BucketFolder:
    """A `Destination` in a bucket."""

    def __init__(self, target: StoreUrl, settings: Settings) -> None:
        """Raises ConfigurationError: obstore is not installed, or refuses the settings."""
        self._bucket = Bucket(target, settings, what="the bucket", setting="--out")
        digest = hashlib.sha256(self._bucket.url.encode()).hexdigest()[:16]
        self._manifest = settings.data_dir / "farm" / digest / MANIFEST_NAME

    @property
    def url(self) -> str:
        return self._bucket.url

    @property
    def manifest(self) -> Path:
        return self._manifest

    def check(self) -> None:
        try:
            self._manifest.parent.mkdir(parents=True, exist_ok=True)
            self._bucket.put(_PROBE, b"", setup=True)
            self._bucket.delete([_PROBE])
        except (BlobStoreUnavailable, OSError) as error:
            raise ConfigurationError(str(error), field="out") from None

    def write(self, name: str, data: bytes) -> None:
        self._bucket.put(name, data)

    def present(self, names: Collection[str]) -> set[str]:
        if len(names) <= _FEW:
            return {name for name in names if self._bucket.has(name)}
        return {str(item["path"]) for item in self._bucket.listing("")} & set(names)  # a thousand to a request

    def read_copy(self) -> bytes | None:
        return self._bucket.get(MANIFEST_NAME)

    def keep_copy(self, data: bytes) -> None:
        self._bucket.put(MANIFEST_NAME, data)


def write_durably(path: Path, data: bytes) -> None:
    """Puts `data` at `path`: the old file or the new one is there at any moment, and the new one when this returns.

    Raises:
        OSError: the file system refused; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Writes a folder's entries to disk: only then does a rename in it outlive a loss of power."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _make_folders(path: Path, *, below: Path) -> None:
    if path.is_dir():
        return
    path.mkdir(parents=True, exist_ok=True)
    for parent in path.parents:
        sync_folder(parent)
        if parent == below:
            break
