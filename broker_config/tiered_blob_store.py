"""Small blobs in the broker, large ones in the store that `LATENTQ_BLOB_STORE` names. What goes where is decided here.

DESIGN. The external store is opened at first need, or by `verify` (workers, gateway and janitor call it at their
start). Opening compares the store's id with the one the broker knows, so a folder of another host, an unmounted disk,
another bucket, and a store that belongs to another broker are errors of configuration, not lost latents. A broker has
one external store. A blob that goes there gets a name nobody had before; `external_index` says why.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from broker_config.blob_store import REDIS_STORE, RedisBlobStore, checked, checked_span
from broker_config.connection import Connections
from broker_config.errors import BlobError, BlobMissing, BlobStoreUnavailable, BlobStoreUnknown, ConfigurationError
from broker_config.external_index import ExternalIndex, Registration
from broker_config.external_store import ExternalStore, Span, StoreUrl, check_name
from broker_config.file_store import FileStore
from broker_config.messages import BlobRef
from broker_config.settings import Settings

#: A write may take this much longer than the provisional lifetime: 100 kB/s is a bad line.
_SLOWEST_BYTES_PER_S: Final = 100_000
#: Rounds of reading and creating an id; a process that is third of three may need as many.
_SETUP_TRIES: Final = 5
_MOVING: Final = "docs/blob-stores.md says how to move to another store"


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedStore:
    """An external store whose id the broker knows."""

    #: What stands in `BlobRef.store`.
    id: str
    store: ExternalStore


def store_at(settings: Settings) -> ExternalStore | None:
    """The store that the settings name, not opened yet; None: all blobs lie in the broker.

    Raises:
        ConfigurationError: S3 without obstore, or settings it refuses.
    """
    if settings.blob_store is None:
        return None
    target = StoreUrl.parse(settings.blob_store)
    if target.folder is not None:
        return FileStore(target.folder)
    from broker_config.object_store import ObjectStore

    return ObjectStore(target, settings)


class TieredBlobStore:
    """A `BlobStore` with two tiers. Thread-safe."""

    def __init__(self, connections: Connections, settings: Settings) -> None:
        self._settings = settings
        self._broker = RedisBlobStore(connections, provisional_s=settings.provisional_s)
        #: What the broker knows of the external store.
        self.index = ExternalIndex(connections)
        self._lock = threading.Lock()
        self._opened: OpenedStore | None = None
        self._unopened: ExternalStore | None = None
        self._known_id: str | None = None

    def put(self, name: str, data: bytes, *, past_limit: bool = False) -> BlobRef:
        """Stores `data`, provisionally, and says where it lies. Safe to repeat; a repetition may lie elsewhere.

        `past_limit`: also when the broker's memory is full.

        Raises:
            BlobStoreUnavailable: the external store did not take it; what it may hold of it is removed later.
            BrokerUnreachable: the broker does not answer.
        """
        if self.lies_in_broker(len(data)):
            return self._broker.put(name, data, past_limit=past_limit)
        opened = self._open()
        unique = check_name(f"{name}.{uuid4().hex}")
        lifetime_s = self._settings.provisional_s + len(data) / _SLOWEST_BYTES_PER_S
        self.index.reserve(opened.id, unique, lifetime_s=lifetime_s)
        opened.store.write(unique, data)
        return BlobRef(store=opened.id, name=unique, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    def lies_in_broker(self, size_bytes: int) -> bool:
        """Whether a blob of this size goes to the broker."""
        return self._settings.blob_store is None or size_bytes <= self._settings.blob_threshold_bytes

    def is_inline(self, size_bytes: int) -> bool:
        """Whether a blob of this size may travel with the script that takes ownership of it."""
        return self.lies_in_broker(size_bytes) and self._broker.is_inline(size_bytes)

    def get_many(self, refs: Sequence[BlobRef]) -> list[bytes | BlobError]:
        """The bytes of each of `refs`, or what is wrong with that one alone; those in the broker in one round trip.

        Raises:
            BlobStoreUnavailable: the external store does not answer.
            BrokerUnreachable: the broker does not.
        """
        here = [ref for ref in refs if ref.store == REDIS_STORE]
        found = iter(self._broker.get_many(here) if here else [])
        return [next(found) if ref.store == REDIS_STORE else self._get_or_error(ref) for ref in refs]

    def get(self, ref: BlobRef) -> bytes:
        """The bytes of `ref`.

        Raises:
            BlobMissing: nothing lies under the name, or (`BlobStoreUnknown`) this process knows no such store.
            BlobCorrupt: what lies there is not what was stored.
            BlobStoreUnavailable: the external store does not answer.
        """
        if ref.store == REDIS_STORE:
            return self._broker.get(ref)
        return checked(ref, self._read_outside(ref))

    def get_span(self, ref: BlobRef, span: Span) -> bytes:
        """The bytes of `ref` in `span` alone, which are therefore not checked against its sha256. Errors as `get`."""
        if ref.store == REDIS_STORE:
            return self._broker.get_span(ref, span)
        return checked_span(ref, self._read_outside(ref, span), span)

    def link(self, ref: BlobRef, *, lifetime_s: float) -> str | None:
        """A URL that hands out `ref` for so long, without the gateway; None: where it lies, nobody makes such.

        The external store is not asked: a bucket that hangs must not hold up whoever only points to it.

        Raises:
            BrokerUnreachable: the broker does not answer.
        """
        if ref.store == REDIS_STORE:
            return None
        signer = self._signer()
        if signer is None or ref.store != self._registered_id():
            return None
        return signer.link(ref.name, lifetime_s=lifetime_s)

    def verify(self) -> None:
        """Checks that this process uses the store that the broker knows, and none if it knows none.

        Raises:
            ConfigurationError: it does not.
            BlobStoreUnavailable: the store does not answer.
            BrokerUnreachable: the broker does not.
        """
        if self._settings.blob_store is not None:
            self._open()
            return
        known = self.index.registered()
        if known is not None:
            raise ConfigurationError(
                f"the broker's large blobs lie in {known[1]}, but LATENTQ_BLOB_STORE is not set here: set it to that; "
                f"{_MOVING}"
            )

    def external(self) -> OpenedStore | None:
        """The external store, opened; None: there is none. Raises as `verify`."""
        return self._open() if self._settings.blob_store is not None else None

    def close(self) -> None:
        """Closes the external store."""
        with self._lock:
            if self._opened is not None:
                self._opened.store.close()
            self._opened = None
            if self._unopened is not None:
                self._unopened.close()
            self._unopened = None

    # Inside ---------------------------------------------------------------------------------------------

    def _signer(self) -> ExternalStore | None:
        """The external store as the settings name it, which was asked nothing yet."""
        if self._unopened is None:
            self._unopened = store_at(self._settings)
        return self._unopened

    def _registered_id(self) -> str | None:
        """Id of the broker's store: asked for once, since a process keeps to one store for as long as it runs."""
        if self._known_id is None:
            known = self.index.registered()
            self._known_id = None if known is None else known[0]
        return self._known_id

    def _read_outside(self, ref: BlobRef, span: Span | None = None) -> bytes:
        opened = self._open() if self._settings.blob_store is not None else None
        if opened is None or opened.id != ref.store:
            raise self._unknown(ref)
        data = opened.store.read(check_name(ref.name), span)
        if data is None:
            _check_present(opened)
            raise BlobMissing(f"blob {ref.name} is gone from {opened.store.url}: its retention ended")
        return data

    def _get_or_error(self, ref: BlobRef) -> bytes | BlobError:
        try:
            return self.get(ref)
        except BlobError as error:
            return error

    def _open(self) -> OpenedStore:
        with self._lock:
            if self._opened is None:
                store = store_at(self._settings)
                assert store is not None
                self._opened = OpenedStore(id=self._identify(store), store=store)
            return self._opened

    def _identify(self, store: ExternalStore) -> str:
        """The store's id, once store and broker agree on it; makes the store if the broker has none."""
        for _ in range(_SETUP_TRIES):
            found = store.read_id()
            known = self.index.register(url=store.url, found=found)
            if known.word == "ours":
                return known.store_id
            if known.word == "create":
                store.create_id(known.store_id)
            elif store.read_id() == found:  # else someone set it up between our two questions
                raise _disagree(store.url, found, known)
        raise BlobStoreUnavailable(f"the blob store {store.url} forgets its id: does it keep what is written to it?")

    def _unknown(self, ref: BlobRef) -> BlobMissing:
        known = self.index.registered()
        if known is None or known[0] != ref.store:
            return BlobMissing(f"blob {ref.name} lies in store {ref.store}, which the broker does not know (any more)")
        return BlobStoreUnknown(
            f"blob {ref.name} lies in {known[1]}: set LATENTQ_BLOB_STORE to that in this process, too"
        )


def _check_present(opened: OpenedStore) -> None:
    """A store that went away must not look like one whose blobs are gone: a job would fail instead of wait."""
    try:
        if opened.store.read_id() == opened.id:
            return
    except ConfigurationError:
        pass
    raise BlobStoreUnavailable(
        f"the blob store {opened.store.url} is not what it was when this process started: is it still mounted?"
    )


def _disagree(url: str, found: str | None, known: Registration) -> ConfigurationError:
    if known.word == "foreign":
        return ConfigurationError(
            f"the blob store {url} has id {found}, which the broker does not know: it belongs to another broker, or "
            f"this one lost its data. Set LATENTQ_BLOB_STORE to a place of its own; {_MOVING}"
        )
    here = f"has id {found}" if found else "is empty"
    return ConfigurationError(
        f"the broker's blob store has id {known.store_id} and was set up at {known.url}, but {url} {here}: is it "
        f"mounted here, and not a folder of this host alone? LATENTQ_BLOB_STORE must lead every process to the same "
        f"store; {_MOVING}"
    )
