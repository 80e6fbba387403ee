"""Blobs as objects of an S3-compatible bucket, through obstore (extra `s3`).

DESIGN. An object is visible when the service has acknowledged the whole of it: a PUT, or from `_PART_BYTES` on a
multipart upload, whose parts nobody sees before its completion. A client killed in between leaves parts that only the
service can list; a lifecycle rule of the bucket removes them (docs/blob-stores.md). obstore repeats a request that
failed a few times; what still fails is `BlobStoreUnavailable`, and the caller decides how patient to be.

The id is written with `If-None-Match: *`, so of two that make a store at one moment one wins (AWS, MinIO, R2, Ceph;
a service that ignores the header lets the last one win, which the other notices at its next start).

Layout: `<prefix>/latentq-store.json`, `<prefix>/blobs/<name>`.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from broker_config.errors import BlobStoreUnavailable, ConfigurationError, LatentqError
from broker_config.external_store import ID_NAME, StoredBlob, StoreUrl, check_name, id_from_bytes, id_to_bytes, is_name

if TYPE_CHECKING:
    from broker_config.settings import Settings

#: From this size on an object goes up in parts of this size: four at a time fill a 10 Gbit/s line, and one that was
#: lost costs a sixth of a second there.
_PART_BYTES: Final = 16 << 20
_PARALLEL_PARTS: Final = 4
_CONNECT_TIMEOUT_S: Final = 5
#: One part over a 5 Mbit/s line.
_REQUEST_TIMEOUT_S: Final = 30
#: Together well below a lease's stage limit; a worker goes on trying after that.
_RETRIES: Final = 4
_RETRY_FOR_S: Final = 60
_PAGE: Final = 1000
_FOLDER: Final = "blobs/"


class ObjectStore:
    """An `ExternalStore` in a bucket."""

    def __init__(self, target: StoreUrl, settings: Settings, *, part_bytes: int = _PART_BYTES) -> None:
        """Args:
        target: bucket and prefix.
        settings: endpoint, region and credentials (`s3_…`). Without credentials the usual AWS sources serve:
            `AWS_…` variables, web identity, instance role.
        part_bytes: size from which, and in which, objects go up in parts; S3 allows no smaller ones than 5 MiB.

        Raises:
            ConfigurationError: obstore is not installed, or refuses the settings.
        """
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        except ImportError as error:
            raise ConfigurationError(f"LATENTQ_BLOB_STORE={target} needs obstore: pip install 'latentq[s3]'") from error
        self._api = obstore
        self._driver_error = BaseError
        self._target = target
        self._endpoint = settings.s3_endpoint
        self._part_bytes = part_bytes
        seconds = datetime.timedelta
        try:
            self._store = S3Store(
                target.bucket,
                prefix=target.prefix or None,
                client_options={
                    "allow_http": settings.s3_allow_http,
                    "connect_timeout": seconds(seconds=_CONNECT_TIMEOUT_S),
                    "timeout": seconds(seconds=_REQUEST_TIMEOUT_S),
                },
                retry_config={"max_retries": _RETRIES, "retry_timeout": seconds(seconds=_RETRY_FOR_S)},
                disable_bulk_delete=True,  # several compatible services have no bulk delete
                **_config(settings),
            )
        except (BaseError, ValueError) as error:
            raise ConfigurationError(f"the blob store {self.url} is not usable: {_first_line(error)}") from None

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`, and the endpoint where one is set."""
        return f"{self._target} at {self._endpoint}" if self._endpoint else str(self._target)

    def close(self) -> None:
        """Nothing is held open that could be closed."""

    # The store's id -------------------------------------------------------------------------------------

    def read_id(self) -> str | None:
        """The id of the store under this prefix; None: there is none.

        Raises:
            ConfigurationError: no such bucket, no access, or a damaged id.
        """
        with self._errors("read", setup=True):
            data = self._get(ID_NAME)
        return None if data is None else id_from_bytes(data, url=self.url)

    def create_id(self, store_id: str) -> None:
        """Writes the id, unless there is one.

        Raises:
            ConfigurationError: no such bucket, or no access.
        """
        from obstore.exceptions import AlreadyExistsError

        with self._errors("written", setup=True), contextlib.suppress(AlreadyExistsError):
            self._api.put(self._store, ID_NAME, id_to_bytes(store_id), mode="create")

    # Blobs ----------------------------------------------------------------------------------------------

    def write(self, name: str, data: bytes) -> None:
        """Stores `data` under `name`; when this returns the service has acknowledged it."""
        key = _FOLDER + check_name(name)
        with self._errors("written"):
            self._api.put(
                self._store,
                key,
                data,
                use_multipart=len(data) > self._part_bytes,
                chunk_size=self._part_bytes,
                max_concurrency=_PARALLEL_PARTS,
            )

    def read(self, name: str) -> bytes | None:
        """The bytes under `name`; None: there are none."""
        key = _FOLDER + check_name(name)
        with self._errors("read"):
            return self._get(key)

    def delete(self, names: Sequence[str]) -> None:
        """Removes these objects."""
        with self._errors("deleted from"):
            self._api.delete(self._store, [_FOLDER + check_name(name) for name in names])

    def listing(self) -> Iterator[StoredBlob]:
        """Every blob, a page at a time."""
        pages = self._api.list(self._store, _FOLDER, chunk_size=_PAGE)
        while True:
            with self._errors("listed"):
                page: Any = next(pages, None)
            if page is None:
                return
            now = datetime.datetime.now(datetime.UTC)
            for item in page:
                name = item["path"].rpartition("/")[2]
                if is_name(name):
                    yield StoredBlob(name=name, age_s=(now - item["last_modified"]).total_seconds())

    def drop_partial(self, *, older_than_s: float) -> int:
        """Nothing: the bucket's lifecycle rule removes uploads that were not completed."""
        return 0

    # Inside ---------------------------------------------------------------------------------------------

    def _get(self, key: str) -> bytes | None:
        try:
            return bytes(self._api.get(self._store, key).bytes())
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None

    @contextlib.contextmanager
    def _errors(self, doing: str, *, setup: bool = False) -> Iterator[None]:
        from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except LatentqError:
            raise
        except (self._driver_error, OSError, ValueError) as error:
            reason = ""
            if isinstance(error, PermissionDeniedError | UnauthenticatedError):
                reason = "the credentials do not allow it"
            elif isinstance(error, FileNotFoundError) and "NoSuchBucket" in str(error):
                reason = "there is no such bucket"
            if reason:
                kind = ConfigurationError if setup else BlobStoreUnavailable
                raise kind(
                    f"the blob store {self.url} cannot be {doing}: {reason}; check LATENTQ_BLOB_STORE and LATENTQ_S3_…"
                ) from None
            raise BlobStoreUnavailable(
                f"the blob store {self.url} cannot be {doing}: {_first_line(error)}; check the service, the network "
                "and LATENTQ_S3_ENDPOINT"
            ) from None


def _config(settings: Settings) -> dict[str, Any]:
    secrets = {
        "access_key_id": settings.s3_access_key_id,
        "secret_access_key": settings.s3_secret_access_key,
        "session_token": settings.s3_session_token,
    }
    config: dict[str, Any] = {name: value.get_secret_value() for name, value in secrets.items() if value is not None}
    plain = {"endpoint": settings.s3_endpoint, "region": settings.s3_region}
    return config | {name: value for name, value in plain.items() if value is not None}


def _first_line(error: Exception) -> str:
    """What the driver says, without the dump of its innards that follows."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition("<?xml")[0].strip(" :")[:300]
