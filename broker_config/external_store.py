"""What a store of blobs outside the broker must do, how it is named by a URL, and which names it takes.

`file_store` and `object_store` implement it; `external_index` keeps in the broker what they hold and until when;
`tiered_blob_store` decides what goes there. A store knows nothing of jobs.

Names are opaque and never used twice (`tiered_blob_store` says why). They come out of messages, so whoever can
write to the broker chooses them: nothing outside the pattern reaches a file system or a bucket.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, Self
from urllib.parse import unquote, urlsplit

from broker_config.errors import BlobMissing, ConfigurationError

#: File or object that holds a store's id.
ID_NAME: Final = "latentq-store.json"
#: No slash, no leading dot, no `..`; short enough for a file name with a temporary's suffix (255 bytes).
_NAME: Final = re.compile(r"(?!.*\.\.)[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
_ID: Final = re.compile(r"[0-9a-f]{32}")
#: The rules every S3-compatible service agrees on.
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX: Final = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


#: First byte, and the one behind the last.
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredBlob:
    """A blob as a listing shows it."""

    name: str
    #: Seconds since it was written, by the store's clock against ours: good for margins, not for decisions.
    age_s: float


class ExternalStore(Protocol):
    """Bytes under names, outside the broker. Thread-safe.

    Raises, from every method:
        BlobStoreUnavailable: the store does not do what it should; the same call may succeed later.
    """

    @property
    def url(self) -> str:
        """Where it is, without credentials: fit for messages and logs."""
        ...

    def read_id(self) -> str | None:
        """The store's id; None: nobody has made a store here.

        Raises:
            ConfigurationError: what is there is not ours, or may not be read and written by this process.
        """
        ...

    def create_id(self, store_id: str) -> None:
        """Makes this place a store, unless someone did so before: read the id again to see who won.

        Raises:
            ConfigurationError: it cannot be made here.
        """
        ...

    def write(self, name: str, data: bytes) -> None:
        """Stores `data`: when this returns it is on disk, or acknowledged. Nothing is visible before it is whole."""
        ...

    def read(self, name: str, span: Span | None = None) -> bytes | None:
        """What lies under `name`, or the bytes of it in `span`; None: nothing."""
        ...

    def link(self, name: str, *, lifetime_s: float) -> str | None:
        """A URL that hands out what lies under `name` for so long, to whoever has it; None: this store makes none."""
        ...

    def delete(self, names: Sequence[str]) -> None:
        """Removes what lies under these names; what is not there counts as removed."""
        ...

    def listing(self) -> Iterator[StoredBlob]:
        """Every blob, in no order, while others write and delete."""
        ...

    def drop_partial(self, *, older_than_s: float) -> int:
        """Removes what writers that died have left behind. Returns how many."""
        ...

    def close(self) -> None:
        """Gives back what is held open."""
        ...


def check_name(name: str) -> str:
    """`name`, if it is one that may reach a store.

    Raises:
        BlobMissing: it is not; nothing can lie under it.
    """
    if not _NAME.fullmatch(name):
        raise BlobMissing(f"{name[:80]!r} is not the name of a blob")
    return name


def is_name(name: str) -> bool:
    """Whether `name` may be that of a blob."""
    return _NAME.fullmatch(name) is not None


def id_to_bytes(store_id: str) -> bytes:
    """What stands under `ID_NAME`."""
    note = "This is a blob store of latentq. Its id is registered with one broker: do not copy this file."
    return json.dumps({"latentq_store": 1, "id": store_id, "note": note}, indent=1).encode() + b"\n"


def id_from_bytes(data: bytes, *, url: str) -> str:
    """The id in what stands under `ID_NAME`.

    Raises:
        ConfigurationError: it is damaged, or of a newer version.
    """
    try:
        wire = json.loads(data)
        if wire["latentq_store"] == 1 and _ID.fullmatch(wire["id"]):
            return str(wire["id"])
    except (ValueError, TypeError, KeyError):
        pass
    raise ConfigurationError(f"{ID_NAME} of the blob store {url} is damaged or of a newer version: restore it")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreUrl:
    """Where blobs go: `file:///folder` or `s3://bucket/prefix`."""

    #: Set for file.
    folder: Path | None = None
    #: Set for s3.
    bucket: str = ""
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Self:
        """The store a URL names.

        Raises:
            ValueError: another scheme, a relative folder, no bucket, credentials in the URL.
        """
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("the URL has no user, query or fragment; credentials have settings of their own")
        if parts.scheme == "file":
            folder = Path(unquote(parts.path))
            if parts.netloc not in ("", "localhost") or not folder.is_absolute() or ".." in folder.parts:
                raise ValueError("a folder is named as file:///absolute/path")
            return cls(folder=folder)
        if parts.scheme == "s3":
            prefix = parts.path.strip("/")
            if not _BUCKET.fullmatch(parts.netloc) or ".." in parts.netloc:
                raise ValueError("a bucket is named as s3://bucket/prefix")
            if prefix and (not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/"))):
                raise ValueError("a prefix consists of A-Z a-z 0-9 _ . - and /")
            return cls(bucket=parts.netloc, prefix=prefix)
        raise ValueError("use file:///absolute/folder or s3://bucket/prefix")

    def __str__(self) -> str:
        if self.folder is not None:
            return self.folder.as_uri()
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")
