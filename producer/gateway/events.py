"""`/v1/decodes/{id}/events`: a job's way as server-sent events, from where it is to its end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from aiohttp import web

from producer.gateway import jobs
from producer.gateway.job_views import show_job
from producer.gateway.query import only
from producer.gateway.streams import HEARTBEAT_S, EventStream

#: Progress and position are looked at this often; the end rings.
_LOOK_S: Final = 1.0


async def events(request: web.Request) -> web.StreamResponse:
    """One event whenever the job changed: `queued` (with its position), `processing` (with its progress), its end."""
    gateway, identity = jobs.context(request)
    only(request.query)
    job_id = (await jobs.find(gateway, identity, request.match_info["id"])).job_id
    with gateway.streams.admitted(identity), gateway.client.feed.watching(job_id) as watch:
        async with EventStream(request, patience_s=gateway.own.patience_s) as stream:
            last, told = "", 0.0
            while True:
                job, position = await gateway.lookout.look(job_id)
                shown = show_job(job, identity, position=position).model_dump_json()
                if shown != last:
                    await stream.send(job.status, shown)
                    last, told = shown, time.monotonic()
                elif time.monotonic() - told > HEARTBEAT_S:
                    await stream.beat()
                    told = time.monotonic()
                if job.status.is_terminal:
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await watch.rung.wait()
                watch.rung.clear()
        return stream.response
