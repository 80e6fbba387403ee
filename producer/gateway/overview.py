"""What the status page shows, put together once a second at most, however many look."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from typing import Final

from aiohttp import web

from broker_config.job_status import JobStatus
from broker_config.queue_report import QueueState, WorkerState
from broker_config.tally import Pulse, Tallies
from producer.async_client import AsyncDecodeClient
from producer.gateway import job_lists, jobs
from producer.gateway.admittance import Readmittance
from producer.gateway.api_keys import Scope
from producer.gateway.context import Gateway
from producer.gateway.identity import Identity
from producer.gateway.job_views import show_jobs
from producer.gateway.query import only
from producer.gateway.schemas import Overview, Point, Queue, Queues, Vae, Vaes, WebhookState, Worker, Workers
from producer.gateway.streams import HEARTBEAT_S, EventStream, json_response
from producer.gateway.webhook_views import owned_by, show_delivery
from producer.operations import Operations

_FRESH_S: Final = 1.0
_LOOK_S: Final = 2.0
#: Nobody has asked for it for so long.
_FORGET_S: Final = 60.0
_CHART_MINUTES: Final = 15
_GALLERY: Final = 24
_FAILED: Final = 12
#: Of webhooks, for who sees all.
_COUNTS: Final = ("pending", "dead_letters", "couriers", "overdue_s")


class Overviews:
    """Queues, workers and charts, which are the same for everyone, looked at once for all."""

    def __init__(self, client: AsyncDecodeClient, operations: Operations, tallies: Tallies) -> None:
        self._client = client
        self._operations = operations
        self._tallies = tallies
        self._lock = asyncio.Lock()
        self._at = -1e9
        self._shared: tuple[list[Queue], list[Worker], list[Point]] = ([], [], [])
        self._texts: dict[str, tuple[float, str]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def shared(self) -> tuple[list[Queue], list[Worker], list[Point]]:
        """As they were at most a second ago."""
        async with self._lock:
            if time.monotonic() - self._at > _FRESH_S:
                self._shared = await self._client.run(self._look)
                self._at = time.monotonic()
            return self._shared

    async def text_for(self, gateway: Gateway, identity: Identity) -> str:
        """All that this identity may see, as JSON, as it was at most a second ago."""
        lock = self._locks.setdefault(identity.name, asyncio.Lock())
        async with lock:
            now = time.monotonic()
            at, text = self._texts.get(identity.name, (-1e9, ""))
            if now - at > _FRESH_S:
                text = (await _overview(gateway, identity)).model_dump_json()
                for name in [name for name, (then, _) in self._texts.items() if now - then > _FORGET_S]:
                    del self._texts[name]
                    self._locks.pop(name, None)
                self._texts[identity.name] = (time.monotonic(), text)
            return text

    def _look(self) -> tuple[list[Queue], list[Worker], list[Point]]:
        report = self._operations.report
        queues = [_queue(queue) for queue in report.queues()]
        workers = [_worker(worker) for worker in report.workers(self._client.catalog)]
        return queues, workers, [_point(pulse) for pulse in self._tallies.pulses(minutes=_CHART_MINUTES)]


async def overview(request: web.Request) -> web.StreamResponse:
    """`GET /v1/overview`."""
    gateway, identity = jobs.context(request)
    only(request.query)
    identity.require(Scope.READ)
    text = await gateway.overviews.text_for(gateway, identity)
    return web.Response(text=text, content_type="application/json")


async def overview_events(request: web.Request) -> web.StreamResponse:
    """`GET /v1/overview/events`: the same whenever it changed, as server-sent events."""
    gateway, identity = jobs.context(request)
    only(request.query)
    identity.require(Scope.READ)
    with gateway.streams.admitted(identity):
        async with EventStream(request, patience_s=gateway.own.patience_s) as stream:
            last, told = "", 0.0
            door = Readmittance(request, gateway, identity)
            while not gateway.stopping.is_set():
                await door.check()
                now = await gateway.overviews.text_for(gateway, identity)
                if now != last:
                    await stream.send("overview", now)
                    last, told = now, time.monotonic()
                elif time.monotonic() - told > HEARTBEAT_S:
                    await stream.beat()
                    told = time.monotonic()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await gateway.stopping.wait()
        return stream.response


async def queues(request: web.Request) -> web.StreamResponse:
    """`GET /v1/queues`."""
    gateway, identity = jobs.context(request)
    only(request.query)
    identity.require(Scope.READ)
    found, _, _ = await gateway.overviews.shared()
    return json_response(Queues(queues=found))


async def workers(request: web.Request) -> web.StreamResponse:
    """`GET /v1/workers`."""
    gateway, identity = jobs.context(request)
    only(request.query)
    identity.require(Scope.READ_ALL)
    _, found, _ = await gateway.overviews.shared()
    return json_response(Workers(workers=found))


async def vaes(request: web.Request) -> web.StreamResponse:
    """`GET /v1/vaes`."""
    gateway, _ = jobs.context(request)
    only(request.query)
    catalog = gateway.client.catalog
    served = await gateway.client.run(gateway.client.store.served, catalog)
    fields = ("name", "title", "vae_class", "channels", "spatial", "temporal", "fps")
    found = [
        Vae(**{name: getattr(entry, name) for name in fields}, layouts=list(entry.layouts), served=entry.name in served)
        for entry in catalog.values()
    ]
    return json_response(Vaes(vaes=found))


async def _overview(gateway: Gateway, identity: Identity) -> Overview:
    found, alive, points = await gateway.overviews.shared()

    def look() -> Overview:
        store = gateway.client.store

        jobs_of = job_lists.newest(gateway, identity, {JobStatus.SUCCEEDED: _GALLERY, JobStatus.FAILED: _FAILED})
        return Overview(
            queues=found,
            workers=alive if identity.sees_all else None,
            webhooks=_webhooks(gateway, identity),
            points=points,
            recent=show_jobs(store, jobs_of[JobStatus.SUCCEEDED], identity),
            failed=show_jobs(store, jobs_of[JobStatus.FAILED], identity),
        )

    return await gateway.client.run(look)


def _webhooks(gateway: Gateway, identity: Identity) -> WebhookState:
    page = gateway.deliveries.page(limit=_FAILED, key_id=owned_by(identity))
    dead = [show_delivery(delivery, identity) for delivery in page.deliveries]
    if not identity.sees_all:
        return WebhookState(dead=dead)
    counts = gateway.deliveries.counts()
    return WebhookState(dead=dead, **{name: getattr(counts, name) for name in _COUNTS})


def _queue(queue: QueueState) -> Queue:
    return Queue(**{name: getattr(queue, name) for name in Queue.model_fields})


def _worker(worker: WorkerState) -> Worker:
    return Worker(**{name: getattr(worker, name) for name in Worker.model_fields} | {"vaes": list(worker.vaes)})


def _point(pulse: Pulse) -> Point:
    return Point(
        at=datetime.fromtimestamp(pulse.from_ms / 1000, UTC),
        succeeded=pulse.outcomes["succeeded"],
        failed=pulse.outcomes["failed"],
        canceled=pulse.outcomes["canceled"],
        wait_s=pulse.mean_s["wait"],
        decode_s=pulse.mean_s["decode"],
        encode_s=pulse.mean_s["encode"],
    )
