"""A gateway over the test's broker, keys, and a worker without device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis
import requests
from pydantic import SecretStr

from broker_config.connection import connect_url
from broker_config.job_store import JobStore
from broker_config.settings import Settings, load_settings
from broker_config.tensor_header import write_header
from broker_config.webhook_outbox import WebhookOutbox
from producer.gateway.api_keys import ApiKeys, Scope
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.told_courier import ToldCourier

SAFETENSORS = {"Content-Type": "application/vnd.safetensors"}
RAW = {"Content-Type": "application/octet-stream"}
#: Settings under which jobs may have webhooks.
WEBHOOKS = {
    "public_url": "http://127.0.0.1:8765",
    "link_key": SecretStr("k" * 32),
    "webhook_allow": ("http://receiver:8080",),
}
#: Signs them.
SECRET = "whsec_" + "QUJD" * 11


def latents(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """float32 latents."""
    return np.random.default_rng(seed).standard_normal(shape or (1, 4, 2, 2)).astype(np.float32)


def safetensors(array: np.ndarray[Any, Any] | None = None) -> bytes:
    """A safetensors file of latents."""
    array = latents() if array is None else array
    return write_header(array.dtype.name, array.shape) + array.tobytes()


def problem(answer: requests.Response) -> tuple[int, str]:
    """Status and code of a refusal, once it is what every refusal must be."""
    assert answer.headers["Content-Type"] == "application/problem+json", answer.text
    told = json.loads(answer.content)
    assert told["status"] == answer.status_code
    assert told["detail"]
    assert told["error"] == told["detail"]
    assert "Traceback" not in answer.text
    if answer.status_code in (429, 503):
        assert int(answer.headers["Retry-After"]) >= 1
    return answer.status_code, told["code"]


@pytest.fixture
def settings(broker_url: str) -> Settings:
    """Our own catalogue."""
    return load_settings(redis_url=broker_url, _env_file=None)


@pytest.fixture
def gateways(settings: Settings) -> Iterator[Callable[..., RunningGateway]]:
    """Starts gateways: `gateways(wait_s=0.2)`."""
    running: list[RunningGateway] = []

    def start(over: Settings | None = None, **own: Any) -> RunningGateway:
        made = RunningGateway(over or settings, **own)
        made.__enter__()
        running.append(made)
        return made

    yield start
    for made in running:
        made.__exit__(None, None, None)


@pytest.fixture
def gateway(gateways: Callable[..., RunningGateway]) -> RunningGateway:
    """A gateway on loopback, where everyone may do everything."""
    return gateways()


@pytest.fixture
def guarded(gateways: Callable[..., RunningGateway]) -> RunningGateway:
    """A gateway that wants keys."""
    return gateways(auth="required")


@pytest.fixture
def new_key(broker_url: str) -> Iterator[Callable[..., str]]:
    """Makes keys: `new_key("submit", "read")` is a token."""
    connections = connect_url(broker_url, name="latentq-test")

    def make(*scopes: str, name: str = "someone", **quotas: Any) -> str:
        return ApiKeys(connections).add(name, [Scope(scope) for scope in scopes], **quotas)[1]

    yield make
    connections.close()


@pytest.fixture
def worker(broker_url: str, settings: Settings) -> Iterator[StoreWorker]:
    """Ends jobs as told."""
    connections = connect_url(broker_url, name="latentq-test-worker")
    yield StoreWorker(JobStore(connections, settings))
    connections.close()


@pytest.fixture
def courier(broker_url: str, settings: Settings) -> Iterator[ToldCourier]:
    """Delivers webhooks, or fails to, as told."""
    connections = connect_url(broker_url, name="latentq-test-courier")
    yield ToldCourier(WebhookOutbox(connections, settings))
    connections.close()


@pytest.fixture
def admin(broker_url: str) -> Iterator[redis.Redis]:
    """A bare connection."""
    with redis.Redis.from_url(broker_url) as opened:
        yield opened
