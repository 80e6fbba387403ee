"""A place in an S3-compatible bucket, through obstore (extra `s3`): objects under one prefix, errors in our terms.

`object_store` keeps blobs in one; the prompt farm writes its pictures to one. An object is visible when the service
has acknowledged the whole of it.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from broker_config.errors import BlobStoreUnavailable, ConfigurationError, LatentqError
from broker_config.external_store import StoreUrl

if TYPE_CHECKING:
    from broker_config.settings import Settings

#: From this size on an object goes up in parts of this size: four at a time fill a 10 Gbit/s line, and one that was
#: lost costs a sixth of a second there.
PART_BYTES: Final = 16 << 20
_PARALLEL_PARTS: Final = 4
_CONNECT_TIMEOUT_S: Final = 5
#: A part over an 18 Mbit/s line, or over 5 Mbit/s where it is alone: the four that go up at a time share the line.
_REQUEST_TIMEOUT_S: Final = 30
#: Together well below a lease's stage limit; a worker goes on trying after that.
_RETRIES: Final = 4
_RETRY_FOR_S: Final = 60
_PAGE: Final = 1000
#: Of a presigned URL (AWS Signature Version 4).
_LONGEST_LINK_S: Final = 7 * 86_400


class Bucket:
    """Objects of a bucket under a prefix. Thread-safe."""

    def __init__(
        self, target: StoreUrl, settings: Settings, *, what: str, setting: str, part_bytes: int = PART_BYTES
    ) -> None:
        """Args:
        target: bucket and prefix.
        settings: endpoint, region and credentials (`s3_…`). Without credentials the usual AWS sources serve:
            `AWS_…` variables, web identity, instance role.
        what: what messages call it.
        setting: what named it.
        part_bytes: size from which, and in which, objects go up in parts; S3 allows no smaller ones than 5 MiB.

        Raises:
            ConfigurationError: obstore is not installed, or refuses the settings.
        """
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        except ImportError as error:
            raise ConfigurationError(f"{setting}={target} needs obstore: pip install 'latentq[s3]'") from error
        self._api = obstore
        self._driver_error = BaseError
        self._target = target
        self._endpoint = settings.s3_endpoint
        self._what = what
        self._setting = setting
        self._part_bytes = part_bytes
        self._credentials_last = settings.s3_access_key_id is not None and settings.s3_session_token is None
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
            raise ConfigurationError(f"{what} {self.url} is not usable: {_first_line(error)}") from None

    @property
    def url(self) -> str:
        """`s3://bucket/prefix`, and the endpoint where one is set."""
        return f"{self._target} at {self._endpoint}" if self._endpoint else str(self._target)

    def get(self, key: str, span: tuple[int, int] | None = None, *, setup: bool = False) -> bytes | None:
        """The bytes under `key`, or those from the first of `span` to before its second; None: there are none.

        Raises:
            ConfigurationError: with `setup`, no such bucket or no access.
            BlobStoreUnavailable: otherwise, and whenever the service does not do what it should.
        """
        with self._errors("read", setup=setup):
            try:
                if span is not None:
                    return bytes(self._api.get_range(self._store, key, start=span[0], end=span[1]))
                return bytes(self._api.get(self._store, key).bytes())
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return None

    def put(self, key: str, data: bytes, *, setup: bool = False) -> None:
        """Stores `data` under `key`; when this returns the service has acknowledged it. Errors as `get`."""
        with self._errors("written", setup=setup):
            self._api.put(
                self._store,
                key,
                data,
                use_multipart=len(data) > self._part_bytes,
                chunk_size=self._part_bytes,
                max_concurrency=_PARALLEL_PARTS,
            )

    def create(self, key: str, data: bytes, *, setup: bool = False) -> None:
        """Stores `data` under `key` unless something is there. Errors as `get`."""
        from obstore.exceptions import AlreadyExistsError

        with self._errors("written", setup=setup), contextlib.suppress(AlreadyExistsError):
            self._api.put(self._store, key, data, mode="create")

    def has(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        with self._errors("read"):
            try:
                self._api.head(self._store, key)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise
                return False
        return True

    def link(self, key: str, *, lifetime_s: float) -> str | None:
        """A presigned URL. None where it would end too early: beyond what S3 allows, or with temporary credentials,
        which take it with them.
        """
        if not self._credentials_last or lifetime_s > _LONGEST_LINK_S:
            return None
        with self._errors("linked to"):
            return str(self._api.sign(self._store, "GET", key, datetime.timedelta(seconds=lifetime_s)))

    def delete(self, keys: Sequence[str]) -> None:
        """Removes these objects; what is not there counts as removed."""
        with self._errors("deleted from"):
            self._api.delete(self._store, list(keys))

    def listing(self, folder: str) -> Iterator[Any]:
        """What obstore says of every object in a folder, a page at a time; '': of all below the prefix."""
        pages = self._api.list(self._store, folder or None, chunk_size=_PAGE)
        while True:
            with self._errors("listed"):
                page: Any = next(pages, None)
            if page is None:
                return
            yield from page

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
                    f"{self._what} {self.url} cannot be {doing}: {reason}; check {self._setting} and LATENTQ_S3_…"
                ) from None
            raise BlobStoreUnavailable(
                f"{self._what} {self.url} cannot be {doing}: {_first_line(error)}; check the service, the network "
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
