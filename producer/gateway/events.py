"""`/v1/decodes/{id}/events`: a job's way as server-sent events, from where it is to its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from aiohttp import web

from broker_config.errors import JobNotFound
from broker_config.messages import JobSnapshot
from producer.gateway import jobs
from producer.gateway.context import Gateway
from producer.gateway.identity import Identity
from producer.gateway.job_views import show_jobs
from producer.gateway.query import only
from producer.gateway.streams import HEARTBEAT_S, EventStream

#: Progress and position are looked at this often; the end rings.
_LOOK_S: Final = 1.0


async def events(request: web.Request) -> web.StreamResponse:
    """One event whenever the job changed: `queued` (with its position), `processing` (with its progress), its end."""
    gateway, identity = jobs.context(request)
    only(request.query)
    job = await jobs.find(gateway, identity, request.match_info["id"])
    with gateway.streams.admitted(identity), gateway.client.feed.watching(job.job_id) as watch:
        stream = EventStream(request, patience_s=gateway.own.patience_s)
        await stream.begin()
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client is gone, or no longer reads
            last = ""
            silent_since = time.monotonic()
            while True:
                shown = await _shown(gateway, identity, job)
                if shown != last:
                    await stream.send(job.status, shown)
                    last, silent_since = shown, time.monotonic()
                elif time.monotonic() - silent_since > HEARTBEAT_S:
                    await stream.beat()
                    silent_since = time.monotonic()
                if job.status.is_terminal:
                    return await stream.end()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await watch.rung.wait()
                watch.rung.clear()
                try:
                    job = await gateway.client.job(job.job_id).snapshot()
                except JobNotFound:
                    return await stream.end()
        raise ConnectionResetError("the client stopped reading")


async def _shown(gateway: Gateway, identity: Identity, job: JobSnapshot) -> str:
    (shown,) = await gateway.client.run(show_jobs, gateway.client.store, [job], identity)
    return shown.model_dump_json()
