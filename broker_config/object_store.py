"""Blobs as objects of an S3-compatible bucket.

DESIGN. An object is visible when the service has acknowledged the whole of it: a PUT, or from `PART_BYTES` on a
multipart upload, whose parts nobody sees before its completion. A client killed in between leaves parts that only the
service can list; a lifecycle rule of the bucket removes them (docs/blob-stores.md). obstore repeats a request that
failed a few times; what still fails is `BlobStoreUnavailable`, and the caller decides how patient to be.

The id is written with `If-None-Match: *`, so of two that make a store at one moment one wins (AWS, MinIO, R2, Ceph;
a service that ignores the header lets the last one win, which the other notices at its next start).

Layout: `<prefix>/latentq-store.json`, `<prefix>/blobs/<name>`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from broker_config.bucket import PART_BYTES, Bucket
from broker_config.external_store import (
    ID_NAME,
    Span,
    StoredBlob,
    StoreUrl,
    check_name,
    id_from_bytes,
    id_to_bytes,
    is_name,
)

if TYPE_CHECKING:
    from broker_config.settings import Settings

_FOLDER: Final = "blobs/"


class ObjectStore:
    """An `ExternalStore` in a bucket."""

    def __init__(self, target: StoreUrl, settings: Settings, *, part_bytes: int = PART_BYTES) -> None:
        """Arguments and errors as `Bucket`."""
        self._bucket = Bucket(
            target, settings, what="the blob store", setting="LATENTQ_BLOB_STORE", part_bytes=part_bytes
        )

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`, and the endpoint where one is set."""
        return self._bucket.url

    def close(self) -> None:
        """Nothing is held open that could be closed."""

    # The store's id -------------------------------------------------------------------------------------

    def read_id(self) -> str | None:
        """The id of the store under this prefix; None: there is none.

        Raises:
            ConfigurationError: no such bucket, no access, or a damaged id.
        """
        data = self._bucket.get(ID_NAME, setup=True)
        return None if data is None else id_from_bytes(data, url=self.url)

    def create_id(self, store_id: str) -> None:
        """Writes the id, unless there is one.

        Raises:
            ConfigurationError: no such bucket, or no access.
        """
        self._bucket.create(ID_NAME, id_to_bytes(store_id), setup=True)

    # Blobs ----------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> None:
        """Stores `data` under `name`; when this returns the service has acknowledged it."""
        self._bucket.put(_FOLDER + check_name(name), data)

    def read(self, name: str, span: Span | None = None) -> bytes | None:
        """The bytes under `name`, or those in `span`; None: there are none."""
        return self._bucket.get(_FOLDER + check_name(name), span)

    def link(self, name: str, *, lifetime_s: float) -> str | None:
        """A presigned URL. None where it would end too early."""
        return self._bucket.link(_FOLDER + check_name(name), lifetime_s=lifetime_s)

    def delete(self, names: Sequence[str]) -> None:
        """Removes these objects."""
        self._bucket.delete([_FOLDER + check_name(name) for name in names])

    def listing(self) -> Iterator[StoredBlob]:
        """Every blob, a page at a time."""
        for item in self._bucket.listing(_FOLDER):
            name = item["path"].rpartition("/")[2]
            if is_name(name):
                age = datetime.datetime.now(datetime.UTC) - item["last_modified"]
                yield StoredBlob(name=name, age_s=age.total_seconds())

    def drop_partial(self, *, older_than_s: float) -> int:
        """Nothing: the bucket's lifecycle rule removes uploads that were not completed."""
        return 0
