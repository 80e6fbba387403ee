"""Where latents and artifacts lie. Names are opaque; bytes are checked against their sha256 at every read.

`RedisBlobStore` keeps them in the broker; `tiered_blob_store` puts large ones elsewhere. A blob is written before
anyone owns it, under a provisional lifetime; the scripts take ownership (`scripts/prelude.lua`, `own`). Writing the
same name to Redis again with the same bytes changes nothing, also after someone took ownership: `EXPIRE … GT` treats
a key without TTL as infinite.
"""

from __future__ import annotations

import hashlib
from typing import Final, Protocol

from broker_config import keys
from broker_config.connection import Connections, broker_errors
from broker_config.errors import BlobCorrupt, BlobMissing
from broker_config.messages import BlobRef

REDIS_STORE: Final = "redis"


class BlobStore(Protocol):
    """Stores bytes under opaque names."""

    def put(self, name: str, data: bytes) -> BlobRef:
        """Stores `data`, provisionally, and says where it lies (`name` may have become part of another). Repeatable."""
        ...

    def get(self, ref: BlobRef) -> bytes:
        """The bytes of `ref`.

        Raises:
            BlobMissing: nothing lies under the name.
            BlobCorrupt: what lies there is not what was stored.
        """
        ...


class RedisBlobStore:
    """Blobs as string keys of the broker."""

    def __init__(self, connections: Connections, *, provisional_s: float) -> None:
        self._connections = connections
        self._provisional_ms = round(provisional_s * 1000)

    def put(self, name: str, data: bytes) -> BlobRef:
        key = keys.blob(name)
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
        if data is None:
            raise BlobMissing(f"blob {ref.name} is gone: its retention ended or the broker lost its data")
        assert isinstance(data, bytes)
        return checked(ref, data)


def draft(name: str, data: bytes) -> BlobRef:
    """What a message says of `data` before it is stored. `put` decides where it lies: what that returns takes over."""
    return BlobRef(store=REDIS_STORE, name=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


def address(ref: BlobRef) -> str:
    """What the broker's scripts call a blob: its name, or `<store>/<name>` when it lies outside."""
    return ref.name if ref.store == REDIS_STORE else f"{ref.store}/{ref.name}"


def checked(ref: BlobRef, data: bytes) -> bytes:
    """`data`, if it is what `ref` names.

    Raises:
        BlobCorrupt: length or digest differ.
    """
    if len(data) != ref.size_bytes or hashlib.sha256(data).hexdigest() != ref.sha256:
        raise BlobCorrupt(f"blob {ref.name} has {len(data)} bytes that do not match its sha256 {ref.sha256[:12]}…")
    return data
