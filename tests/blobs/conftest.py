"""Stores outside the broker: a folder, and a bucket of a real S3 API on loopback."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from broker_config.connection import Connections, connect_url
from broker_config.external_store import ExternalStore
from broker_config.job_store import JobStore
from broker_config.settings import Settings, load_settings
from broker_config.tiered_blob_store import TieredBlobStore, store_at
from producer import DecodeClient
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server, need_s3
from tests.support.store_worker import StoreWorker
from worker.blob_sweeper import BlobSweeper

THRESHOLD_BYTES = 1024

_buckets = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The session's S3 API."""
    need_s3()
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """Name of an empty bucket."""
    name = f"latentq-test-{next(_buckets)}"
    s3_server.make_bucket(name)
    return name


@pytest.fixture
def s3_place(s3_server: S3Server, bucket: str) -> dict[str, Any]:
    """Settings that lead to an empty bucket."""
    return {
        "blob_store": f"s3://{bucket}/some/prefix",
        "blob_threshold_bytes": THRESHOLD_BYTES,
        "s3_endpoint": s3_server.endpoint,
        "s3_region": "us-east-1",
        "s3_allow_http": True,
        "s3_access_key_id": ACCESS_KEY,
        "s3_secret_access_key": SECRET_KEY,
    }


@pytest.fixture
def file_place(tmp_path: Path) -> dict[str, Any]:
    """Settings that lead to a folder that does not exist yet."""
    return {"blob_store": (tmp_path / "blobs").as_uri(), "blob_threshold_bytes": THRESHOLD_BYTES}


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings that lead to an empty store of either kind."""
    found: dict[str, Any] = request.getfixturevalue(f"{request.param}_place")
    return found


@pytest.fixture
def settings(broker_url: str, tiny_catalog: Path, place: dict[str, Any]) -> Settings:
    """Settings of a test, with a store outside the broker."""
    return load_settings(
        redis_url=broker_url, catalog=tiny_catalog, lease_s=2.0, lease_renew_s=0.5, _env_file=None, **place
    )


@pytest.fixture
def outer(settings: Settings) -> Iterator[ExternalStore]:
    """The store outside the broker, looked at directly."""
    store = store_at(settings)
    assert store is not None
    yield store
    store.close()


@pytest.fixture
def open_tiers(broker_url: str) -> Iterator[Callable[[Settings], TieredBlobStore]]:
    """Makes both tiers from settings, as another process would; closes them with the test."""
    opened: list[tuple[TieredBlobStore, Connections]] = []

    def make(settings: Settings) -> TieredBlobStore:
        connections = connect_url(broker_url, name="latentq-test")
        blobs = TieredBlobStore(connections, settings)
        opened.append((blobs, connections))
        return blobs

    yield make
    for blobs, connections in opened:
        blobs.close()
        connections.close()


@pytest.fixture
def tiers(settings: Settings, open_tiers: Callable[[Settings], TieredBlobStore]) -> TieredBlobStore:
    """Both tiers, as the settings say."""
    return open_tiers(settings)


@pytest.fixture
def sweeper(tiers: TieredBlobStore) -> BlobSweeper:
    """Deletes what is due, at once."""
    return BlobSweeper(tiers, settle_s=0.0)


@pytest.fixture
def client(connections: Connections, settings: Settings) -> Iterator[DecodeClient]:
    """A producer's client with the store outside the broker."""
    made = DecodeClient(connections, settings=settings)
    yield made
    made.blobs.close()


@pytest.fixture
def admin(broker_url: str) -> Any:
    """The broker itself."""
    with redis.Redis.from_url(broker_url) as opened:
        yield opened


@pytest.fixture
def worker(store: JobStore, tiers: TieredBlobStore) -> StoreWorker:
    """A worker that does nothing but talk to the broker, and stores artifacts in both tiers."""
    made = StoreWorker(store)
    made.blobs = tiers  # type: ignore[assignment]
    return made
