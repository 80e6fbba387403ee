"""`/livez`, `/readyz` and `/metrics`: for whoever keeps a gateway running."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from broker_config.broker_facts import write_refusal
from broker_config.errors import LatentqError
from producer.gateway.admittance import identify
from producer.gateway.api_keys import Scope
from producer.gateway.context import GATEWAY, Gateway
from producer.gateway.middlewares import OPEN
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
        (await identify(request, gateway)).require(Scope.READ_ALL)
    gateway.metrics.streams.set(gateway.streams.open.total())
    gateway.metrics.uploads.set(gateway.uploads.count)
    text = await gateway.client.run(gateway.metrics.text)
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST, "Cache-Control": "no-store"})


#: It asks by itself who asks, since a setting may say that anyone may.
setattr(metrics, OPEN, True)


def _readiness(gateway: Gateway) -> Readiness:
    try:
        gateway.client.blocking.ping()
        refusal = write_refusal(gateway.client.store.connections)
        full = gateway.client.store.full()
    except LatentqError as error:
        return Readiness(ready=False, broker=error.code, admission="unknown")
    if refusal is not None:
        admission = "broker_refuses_writes"
    elif full is not None:
        admission = "memory_full" if full == "memory" else "queue_full"
    else:
        admission = "open"
    return Readiness(ready=admission == "open", broker="answers", admission=admission)
