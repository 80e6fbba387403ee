"""Fixtures: the job state machine on a real broker, Valkey as bundled, and Redis as Debian has it (7.0)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from broker_config.connection import Connections
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.settings import Settings, load_settings
from tests.conftest import need_tool
from tests.support.keys_left import assert_no_stray_keys
from tests.support.store_queue import LONG_S, Queue


@pytest.fixture(scope="session", params=["bundled", "redis-server"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, broker_server: EmbeddedBroker
) -> Iterator[EmbeddedBroker]:
    """The session's broker, and a plain redis-server."""
    if request.param == "bundled":
        yield broker_server
        return
    binary = Path(need_tool("redis-server"))
    folder = tmp_path_factory.mktemp("redis")
    with EmbeddedBroker(folder, binary=binary, max_memory_bytes=512 * 1024 * 1024) as plain:
        yield plain


@pytest.fixture
def broker_url(server: EmbeddedBroker) -> Iterator[str]:
    """URL of an empty broker; afterwards it must hold no stray key."""
    with redis.Redis.from_url(server.url) as admin:
        admin.flushall()
        yield server.url
        assert_no_stray_keys(admin)


@pytest.fixture
def settings(broker_url: str) -> Settings:
    """Leases that do not end by themselves."""
    return load_settings(redis_url=broker_url, lease_s=LONG_S, lease_renew_s=1.0, _env_file=None)


@pytest.fixture
def queue(connections: Connections, settings: Settings, broker_url: str) -> Iterator[Queue]:
    """The broker and what a test does to it."""
    with redis.Redis.from_url(broker_url) as admin:
        yield Queue(connections, settings, admin)
