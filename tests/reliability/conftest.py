"""A broker, what comes between it and a client, and clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from broker_config.connection import connect_url
from broker_config.settings import Settings, load_settings
from producer import DecodeClient
from tests.support.faulty_proxy import FaultyProxy


@pytest.fixture
def admin(broker_url: str) -> Iterator[redis.Redis]:
    """The broker, past the proxy, without any script loaded."""
    with redis.Redis.from_url(broker_url) as opened:
        opened.script_flush()
        yield opened


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultyProxy]:
    """What loses commands and replies between a client and the broker."""
    with FaultyProxy(broker_url) as between:
        yield between


@pytest.fixture
def producer_settings(broker_url: str) -> Settings:
    """Settings of a producer that knows our own catalogue."""
    return load_settings(redis_url=broker_url, _env_file=None)


@pytest.fixture
def open_client(producer_settings: Settings) -> Iterator[Callable[..., DecodeClient]]:
    """Makes clients of a URL; closes them with the test."""
    opened: list[DecodeClient] = []

    def make(url: str, *, retries: int = 3, **overrides: Any) -> DecodeClient:
        settings = producer_settings.model_copy(update=overrides)
        made = DecodeClient(connect_url(url, name="latentq-test", retries=retries), settings=settings)
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.close()
