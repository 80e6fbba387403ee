"""Where latents and artifacts lie. Names are opaque; bytes are checked against their sha256 at every read.

`RedisBlobStore` keeps them in the broker; `tiered_blob_store` puts large ones elsewhere. A blob is written before
anyone owns it, under a provisional lifetime; the scripts take ownership (`scripts/prelude.lua`, `own`). Writing the
same name to Redis again with the same bytes changes nothing, also after someone took ownership: `EXPIRE … GT` treats
a key without TTL as infinite.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

from broker_config import keys
from broker_config.connection import Connections, broker_errors
from broker_config.errors import BlobCorrupt, BlobError, BlobMissing
from broker_config.external_store import Span
from broker_config.messages import BlobRef
from broker_config.scripts import source

REDIS_STORE: Final = "redis"
#: Blobs up to this size travel with the script that takes ownership of them: one round trip, and no moment at which
#: they lie in the broker unowned. Above it a script would hold the broker for more than a millisecond.
INLINE_BYTES: Final = 1 << 20
#: Most bytes of a value in the broker: Redis closes the connection on which a longer one comes (`proto-max-bulk-len`).
LARGEST_BYTES: Final = 512 << 20


class BlobStore(Protocol):
    """Stores bytes under opaque names."""

    def put(self, name: str, data: bytes, *, past_limit: bool = False) -> BlobRef:
        """Stores `data`, provisionally, and says where it lies (`name` may have become part of another). Repeatable.

        `past_limit`: also when the broker's memory is full; for results, whose room admission has reserved.
        """
        ...

    def is_inline(self, size_bytes: int) -> bool:
        """Whether a blob of this size may travel with the script that takes ownership of it, instead of `put`."""
        ...

    def get(self, ref: BlobRef) -> bytes:
        """The bytes of `ref`.

        Raises:
            BlobMissing: nothing lies under the name.
            BlobCorrupt: what lies there is not what was stored.
        """
        ...

    def get_many(self, refs: Sequence[BlobRef]) -> list[bytes | BlobError]:
        """The bytes of each of `refs`, or what is wrong with that one alone."""
        ...


class RedisBlobStore:
    """Blobs as string keys of the broker."""

    def __init__(self, connections: Connections, *, provisional_s: float) -> None:
        self._connections = connections
        self._provisional_ms = round(provisional_s * 1000)
        self._store = connections.blobs.register_script(source("store"))

    def put(self, name: str, data: bytes, *, past_limit: bool = False) -> BlobRef:
        key = keys.blob(name)
        if past_limit:
            with broker_errors(self._connections.url):
                self._store(args=[name, data, self._provisional_ms])
            return draft(name, data)
        with (
            broker_errors(self._connections.url),
            self._connections.blobs.pipeline(transaction=True) as pipe,
        ):
            pipe.set(key, data, px=self._provisional_ms, nx=True)
            pipe.pexpire(key, self._provisional_ms, gt=True)
            pipe.execute()
        return draft(name, data)

    def get(self, ref: BlobRef) -> bytes:
        with broker_errors(self._connections.url):
            data = self._connections.blobs.get(keys.blob(ref.name))
        return checked(ref, _present(ref, data))

    def get_span(self, ref: BlobRef, span: Span) -> bytes:
        """The bytes of `ref` in `span`, which are not checked against its sha256. Errors as `get`."""
        first, end = span
        with (
            broker_errors(self._connections.url),
            self._connections.blobs.pipeline(transaction=True) as pipe,
        ):
            pipe.getrange(keys.blob(ref.name), first, end - 1)
            pipe.exists(keys.blob(ref.name))
            data, there = pipe.execute()
        return checked_span(ref, _present(ref, data if there else None), span)

    def is_inline(self, size_bytes: int) -> bool:
        return size_bytes <= INLINE_BYTES

    def get_many(self, refs: Sequence[BlobRef]) -> list[bytes | BlobError]:
        with broker_errors(self._connections.url):
            found = self._connections.blobs.mget([keys.blob(ref.name) for ref in refs])
        return [checked_or_error(ref, data) for ref, data in zip(refs, found, strict=True)]


def checked_or_error(ref: BlobRef, data: object) -> bytes | BlobError:
    """`data`, if it is what `ref` names; else what is wrong with it (None: it is not there)."""
    try:
        return checked(ref, _present(ref, data))
    except BlobError as error:
        return error


def _present(ref: BlobRef, data: object) -> bytes:
    if not isinstance(data, bytes):
        raise BlobMissing(f"blob {ref.name} is gone: its retention ended or the broker lost its data")
    return data


def draft(name: str, data: bytes) -> BlobRef:
    """What a message says of `data` before it is stored. `put` decides where it lies: what that returns takes over."""
    return BlobRef(store=REDIS_STORE, name=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def address(ref: BlobRef) -> str:
    """What the broker's scripts call a blob: its name, or `<store>/<name>` when it lies outside."""
    return ref.name if ref.store == REDIS_STORE else f"{ref.store}/{ref.name}"


def checked_span(ref: BlobRef, data: bytes, span: Span) -> bytes:
    """`data`, if there is as much of it as `span` has.

    Raises:
        BlobCorrupt: there is less.
    """
    if len(data) != span[1] - span[0]:
        raise BlobCorrupt(f"blob {ref.name} ends {span[1] - span[0] - len(data)} bytes early")
    return data


def checked(ref: BlobRef, data: bytes) -> bytes:
    """`data`, if it is what `ref` names.

    Raises:
        BlobCorrupt: length or digest differ.
    """
    if len(data) != ref.size_bytes or hashlib.sha256(data).hexdigest() != ref.sha256:
        raise BlobCorrupt(f"blob {ref.name} has {len(data)} bytes that do not match its sha256 {ref.sha256[:12]}…")
    return data
