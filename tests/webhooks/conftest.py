"""A job that has ended, a receiver, a courier, and a clock that can be put forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from broker_config.connection import Connections
from broker_config.settings import Settings
from broker_config.webhook_deliveries import WebhookDeliveries
from producer import DecodeClient, JobHandle
from tests.support.receivers import SECRET, Clock, CourierThread, Receiver, with_webhooks
from tests.support.store_worker import StoreWorker

LATENTS = np.zeros((1, 4, 8, 8), np.float32)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With webhooks, to loopback."""
    return with_webhooks(settings)


@pytest.fixture
def deliveries(connections: Connections, settings: Settings) -> WebhookDeliveries:
    """What people see of the outbox."""
    return WebhookDeliveries(connections, settings)


@pytest.fixture
def worker(client: DecodeClient) -> StoreWorker:
    """Ends jobs."""
    return StoreWorker(client.store)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Takes everything, until told otherwise."""
    with Receiver() as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    """Of the courier."""
    return Clock()


@pytest.fixture
def courier(settings: Settings, clock: Clock) -> Iterator[CourierThread]:
    """Delivers."""
    with CourierThread(settings, clock=clock) as running:
        yield running


@pytest.fixture
def ended(client: DecodeClient, worker: StoreWorker) -> Callable[..., JobHandle]:
    """Submits a job with a webhook to a URL, and ends it well."""

    def end(url: str, **options: Any) -> JobHandle:
        job = client.submit(LATENTS, vae="sd", webhook=url, **{"webhook_secret": SECRET, **options})
        worker.succeed(worker.claim_one())
        return job

    return end
