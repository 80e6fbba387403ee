"""`/livez`, `/readyz` and `/metrics`: for whoever keeps a gateway running."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from broker_config.broker_facts import write_refusal
from broker_config.errors import LatentqError
from producer.gateway.api_keys import Scope
from producer.gateway.context import GATEWAY, IDENTITY, Gateway
from producer.gateway.schemas import Readiness
from producer.gateway.streams import json_response


async def livez(request: web.Request) -> web.StreamResponse:
    """The loop turns."""
    return web.Response(text="alive\n", headers={"Cache-Control": "no-store"})


async def readyz(request: web.Request) -> web.StreamResponse:
    """Whether a submit would be taken: the broker answers, and admission is open."""
    gateway = request.app[GATEWAY]
    found = await gateway.client.run(_readiness, gateway)
    return json_response(found, status=200 if found.ready else 503, headers={"Cache-Control": "no-store"})


async def metrics(request: web.Request) -> web.StreamResponse:
    """Everything for Prometheus."""
    gateway = request.app[GATEWAY]
    if not gateway.own.open_metrics:
        request[IDENTITY].require(Scope.READ_ALL)
    gateway.metrics.streams.set(gateway.streams.open.total())
    gateway.metrics.uploads.set(gateway.uploads.count)
    text = await gateway.client.run(gateway.metrics.text)
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"})


def _readiness(gateway: Gateway) -> Readiness:
    try:
        gateway.client.blocking.ping()
        refusal = write_refusal(gateway.client.store.connections)
        totals = gateway.operations.report.totals()
    except LatentqError as error:
        return Readiness(ready=False, broker=error.code, admission="unknown")
    limits = gateway.settings
    if refusal is not None:
        admission = "broker_refuses_writes"
    elif totals.jobs >= limits.max_pending_jobs or totals.latents_bytes >= limits.max_pending_bytes:
        admission = "queue_full"
    else:
        admission = "open"
    return Readiness(ready=admission == "open", broker="answers", admission=admission)
