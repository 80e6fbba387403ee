"""Fixtures: a client whose refusals are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis

from broker_config.connection import Connections
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient, Settings
from tests.support.door import Door


@pytest.fixture
def door(client: DecodeClient, broker_url: str) -> Iterator[Door]:
    with redis.Redis.from_url(broker_url) as admin:
        yield Door(client, admin)


@pytest.fixture
def make_door(door: Door, connections: Connections, settings: Settings) -> Callable[..., Door]:
    """Another client of the same broker, with other limits."""

    def make(**limits: object) -> Door:
        changed = settings.model_copy(update=limits)
        return Door(DecodeClient(connections, settings=changed, catalog=VaeCatalog.load(changed.catalog)), door.admin)

    return make
