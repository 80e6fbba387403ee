"""Fixtures: a real broker, clients, workers in threads and as processes, tiny VAEs of real classes.

A broker runs for the whole session on its own folder; each test starts with it empty and must leave no key behind
that has neither a TTL nor an owner (`assert_no_stray_keys`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from broker_config.connection import Connections, connect_url
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.job_store import JobStore
from broker_config.settings import Settings, load_settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient
from tests.support.keys_left import assert_no_stray_keys
from tests.support.processes import WorkerProcesses
from tests.support.tiny_vaes import write_tiny_catalog


def pytest_configure(config: pytest.Config) -> None:
    """No test reads the developer's own settings."""
    for name in [name for name in os.environ if name.startswith("LATENTQ_")]:
        del os.environ[name]


def need_tool(name: str) -> str:
    """Path of a program; without it the test is skipped on a laptop and fails in CI."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def broker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedBroker]:
    """The session's broker."""
    with EmbeddedBroker(tmp_path_factory.mktemp("broker"), max_memory_bytes=512 * 1024 * 1024) as server:
        yield server


@pytest.fixture
def broker_url(broker_server: EmbeddedBroker) -> Iterator[str]:
    """URL of an empty broker; afterwards it must hold no stray key."""
    with redis.Redis.from_url(broker_server.url) as admin:
        admin.flushall()
        yield broker_server.url
        assert_no_stray_keys(admin)


@pytest.fixture
def settings(broker_url: str, tiny_catalog: Path) -> Settings:
    """Settings of a test: short leases, the tiny VAEs."""
    return load_settings(redis_url=broker_url, catalog=tiny_catalog, lease_s=2.0, lease_renew_s=0.5, _env_file=None)


@pytest.fixture
def connections(broker_url: str) -> Iterator[Connections]:
    """Connections to the test's broker."""
    opened = connect_url(broker_url, name="latentq-test")
    yield opened
    opened.close()


@pytest.fixture
def store(connections: Connections, settings: Settings) -> JobStore:
    """The job state machine on the test's broker."""
    return JobStore(connections, settings)


@pytest.fixture
def client(connections: Connections, settings: Settings) -> DecodeClient:
    """A producer's client."""
    return DecodeClient(connections, settings=settings, catalog=VaeCatalog.load(settings.catalog))


@pytest.fixture(scope="session")
def tiny_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalogue file whose VAEs are tiny, random, of the real classes, saved as safetensors."""
    return write_tiny_catalog(tmp_path_factory.mktemp("vaes"))


@pytest.fixture
def workers(settings: Settings) -> Iterator[WorkerProcesses]:
    """Starts `python -m worker` processes; ends those that are left."""
    started = WorkerProcesses(settings)
    yield started
    started.stop_all()
