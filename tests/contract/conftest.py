"""Fixtures: a broker that our workers and stock RQ share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from broker_config.connection import connect_url
from broker_config.job_store import JobStore
from broker_config.settings import Settings, load_settings
from tests.support import rq_functions
from tests.support.rq_side import Side


@pytest.fixture
def settings(broker_url: str) -> Settings:
    """Leases that do not end by themselves; our own catalogue."""
    return load_settings(redis_url=broker_url, lease_s=60.0, lease_renew_s=1.0, max_errors=2, _env_file=None)


@pytest.fixture
def side(broker_url: str, settings: Settings) -> Iterator[Side]:
    """The test's broker."""
    connections = connect_url(broker_url, name="latentq-test")
    with redis.Redis.from_url(broker_url) as admin:
        yield Side(broker_url, settings, admin, JobStore(connections, settings))
    connections.close()
    rq_functions.during = None
    rq_functions.called.clear()
