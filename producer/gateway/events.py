"""`/v1/decodes/{id}/events`: a job's way as server-sent events, from where it is to its end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from typing import Final

from aiohttp import web

from producer.gateway import jobs
from producer.gateway.admittance import Readmittance
from producer.gateway.context import Gateway
from producer.gateway.job_views import show_job
from producer.gateway.query import only
from producer.gateway.streams import HEARTBEAT_S, EventStream

#: Progress and position are looked at this often; the end rings.
_LOOK_S: Final = 1.0


async def events(request: web.Request) -> web.StreamResponse:
    """One event whenever the job changed: `queued` (with its position), `processing` (with its progress), its end; and
    `preview`, once, if the job asked for one."""
    gateway, identity = jobs.context(request)
    only(request.query)
    job_id = (await jobs.find(gateway, identity, request.match_info["id"])).job_id
    with gateway.streams.admitted(identity), gateway.client.feed.watching(job_id) as watch:
        async with EventStream(request, patience_s=gateway.own.patience_s) as stream:
            last, told, previewed = "", 0.0, False
            door = Readmittance(request, gateway, identity)
            while True:
                await door.check()
                job, position = await gateway.lookout.look(job_id)
                if not previewed and job.request is not None and job.request.preview is not None:
                    previewed = await _show_preview(gateway, stream, job_id, shown_as=identity.shown(job_id))
                shown = show_job(job, identity, position=position).model_dump_json()
                if shown != last:
                    await stream.send(job.status, shown)
                    last, told = shown, time.monotonic()
                elif time.monotonic() - told > HEARTBEAT_S:
                    await stream.beat()
                    told = time.monotonic()
                if job.status.is_terminal or gateway.stopping.is_set():
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await watch.rung.wait()
                watch.rung.clear()
        return stream.response


async def _show_preview(gateway: Gateway, stream: EventStream, job_id: str, *, shown_as: str) -> bool:
    """Sends the preview, if there is one by now. `shown_as`: what the one who watches calls the job."""
    jpeg = await gateway.client.run(gateway.client.store.preview, job_id)
    if jpeg is None:
        return False
    shown = {"id": shown_as, "content_type": "image/jpeg", "data": base64.b64encode(jpeg).decode()}
    await stream.send("preview", json.dumps(shown))
    return True
