"""`/v1/decodes`: submit, look, wait, cancel, decode again, free, list."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any, Final

from aiohttp import BodyPartReader, web

from broker_config.errors import (
    BadRequest,
    BodyTooLarge,
    InternalError,
    InvalidOption,
    JobNotFinished,
    LatentqError,
    MediaTypeUnsupported,
    UploadTooSlow,
    WaitTimeout,
)
from broker_config.job_document import Job, job_url
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from producer.gateway import job_lists, jobs
from producer.gateway.api_keys import Scope
from producer.gateway.context import Gateway
from producer.gateway.error_responses import as_told, problem
from producer.gateway.identity import Identity
from producer.gateway.job_views import show_jobs
from producer.gateway.query import only, options_of, options_of_json, read, seconds, whole
from producer.gateway.schemas import Batch, BatchItem, JobPage
from producer.gateway.streams import json_response
from producer.gateway.submit_bodies import MULTIPART, Parts, SubmitBody, most_bytes
from producer.gateway.uploads import length_of, small_json
from producer.submission import new_job_id

logger = logging.getLogger(__name__)

#: When it is worth looking again at a job that has not ended.
_LOOK_AGAIN: Final = "1"
_PREFER_WAIT = re.compile(r"(?:^|[,;\s])wait\s*(?:=\s*\"?(\d{1,6})\"?)?(?=$|[,;\s])", re.IGNORECASE)
#: Within this a wait ends whose client went away.
_NOTICED_S: Final = 1.0
MOST_JOBS: Final = 200
_PAGE_JOBS: Final = 50


async def create(request: web.Request) -> web.StreamResponse:
    """`POST /v1/decodes`."""
    gateway, identity = jobs.context(request)
    return await _submit(request, gateway, identity, name=None)


async def put(request: web.Request) -> web.StreamResponse:
    """`PUT /v1/decodes/{id}`: as POST, under a name of the client's; the same again is the same job."""
    gateway, identity = jobs.context(request)
    return await _submit(request, gateway, identity, name=request.match_info["id"])


async def show(request: web.Request) -> web.StreamResponse:
    """`GET /v1/decodes/{id}`."""
    gateway, identity = jobs.context(request)
    only(request.query, "wait")
    job = await jobs.find(gateway, identity, request.match_info["id"])
    if "wait" in request.query and not job.status.is_terminal:
        asked = read("wait", request.query["wait"], seconds, "seconds")
        job = await waited(request, job, asked)
    return await _answer(gateway, identity, job, status=200)


async def cancel(request: web.Request) -> web.StreamResponse:
    """`POST /v1/decodes/{id}/cancel`: 200 canceled or ended before; 202 asked for."""
    gateway, identity = jobs.context(request)
    only(request.query)
    job = await jobs.find_to_change(gateway, identity, request.match_info["id"])
    handle = gateway.client.job(job.job_id)
    word = await handle.cancel()
    return await _answer(gateway, identity, await handle.snapshot(), status=200 if word.is_terminal else 202)


async def redecode(request: web.Request) -> web.StreamResponse:
    """`POST /v1/decodes/{id}/redecode`: a new job from the same latents."""
    gateway, identity = jobs.context(request)
    options = options_of(request.query)
    options |= options_of_json(await small_json(request, gateway.own, default={}))
    job = await jobs.find_to_change(gateway, identity, request.match_info["id"])
    again, new = await jobs.redecode(gateway, identity, job, options)
    return await _answer(gateway, identity, again, status=202 if new else 200, made=True)


async def delete(request: web.Request) -> web.StreamResponse:
    """`DELETE /v1/decodes/{id}`: frees latents and outputs of a job that ended."""
    gateway, identity = jobs.context(request)
    only(request.query)
    job = await jobs.find_to_change(gateway, identity, request.match_info["id"])
    if not job.status.is_terminal:
        raise JobNotFinished(f"job {job.job_id} is {job.status}: cancel it first", job_id=job.job_id)
    await gateway.client.job(job.job_id).ack()
    return web.Response(status=204)


async def list_jobs(request: web.Request) -> web.StreamResponse:
    """`GET /v1/decodes`."""
    gateway, identity = jobs.context(request)
    query = request.query
    only(query, "status", "vae", "limit", "cursor")
    status = read("status", query["status"], JobStatus, f"one of {', '.join(JobStatus)}") if "status" in query else None
    limit = read("limit", query.get("limit", str(_PAGE_JOBS)), whole, "a whole number")
    if not 1 <= limit <= MOST_JOBS:
        raise InvalidOption(f"limit is {limit}, expected 1 to {MOST_JOBS}", field="limit")

    def look() -> JobPage:
        page = job_lists.page_of(
            gateway, identity, status=status, vae=query.get("vae"), limit=limit, cursor=query.get("cursor")
        )
        return JobPage(jobs=show_jobs(gateway.client.store, page.jobs, identity), next_cursor=page.cursor)

    identity.require(Scope.READ)
    return json_response(await gateway.client.run(look))


async def create_batch(request: web.Request) -> web.StreamResponse:
    """`POST /v1/decodes/batch`: several jobs in one multipart body; each is accepted or refused by itself.

    A body that breaks off is refused, with what became of the jobs before in `items`.
    """
    gateway, identity = jobs.context(request)
    identity.require(Scope.SUBMIT)
    only(request.query)
    if request.content_type != MULTIPART:
        raise MediaTypeUnsupported(f"a batch is {MULTIPART}: a part `jobs`, then one part of latents for each job")
    most = min(most_bytes(gateway, jobs=gateway.own.max_batch_jobs), gateway.own.max_uploads_bytes)
    length = length_of(request, most=most)
    items: list[BatchItem] = []
    with gateway.uploads.admitted(identity, length):
        parts = Parts(request, gateway)
        part = await parts.next()
        forms = await parts.json(part) if part is not None and part.name == "jobs" else None
        if not isinstance(forms, list) or not all(isinstance(form, dict) for form in forms) or not forms:
            raise BadRequest("the first part of a batch is `jobs`: a JSON list of options, one object for each job")
        if len(forms) > gateway.own.max_batch_jobs:
            raise BodyTooLarge(f"the batch has {len(forms)} jobs, at most {gateway.own.max_batch_jobs} are taken")
        try:
            for form in forms:
                part = await parts.next()
                if part is None:
                    raise BadRequest(f"the batch has {len(forms)} jobs and latents for {len(items)} of them")
                items.append(await _batch_item(request, parts, part, form))
                await parts.skip(part)
            if await parts.next() is not None:
                raise BadRequest(f"the batch has more parts than the {len(forms)} jobs need")
        except (BadRequest, UploadTooSlow) as error:  # nothing after this can be read; what was accepted stays so
            error.more = {"items": [item.model_dump(mode="json") for item in items]}
            raise
    return json_response(Batch(items=items), status=200)


async def waited(request: web.Request, job: JobSnapshot, asked_s: float) -> JobSnapshot:
    """The job once it ended, or after `asked_s` or the longest wait there is, or when gateway or client goes."""
    gateway, _ = jobs.context(request)
    handle = gateway.client.job(job.job_id)
    ended = asyncio.create_task(handle.wait(timeout=min(asked_s, gateway.own.wait_s)), name="wait-for-job")
    stopped = asyncio.create_task(gateway.stopping.wait(), name="wait-for-stop")
    try:
        # A connection that is gone makes room for the next one: a wait for it must not go on besides.
        while request.transport is not None and not (ended.done() or stopped.done()):
            await asyncio.wait((ended, stopped), timeout=_NOTICED_S, return_when=asyncio.FIRST_COMPLETED)
        return await ended if ended.done() else await handle.snapshot()
    except WaitTimeout:
        return await handle.snapshot()
    finally:
        ended.cancel()
        stopped.cancel()


def preferred_wait_s(request: web.Request) -> float | None:
    """Seconds of `Prefer: wait=n` (RFC 7240); None: it is not there. Without a number: as long as may be."""
    match = _PREFER_WAIT.search(",".join(request.headers.getall("Prefer", ())))
    if match is None:
        return None
    return float(match[1]) if match[1] else float("inf")


async def _submit(request: web.Request, gateway: Gateway, identity: Identity, *, name: str | None) -> web.Response:
    identity.require(Scope.SUBMIT)
    body = SubmitBody(gateway, request)
    with gateway.uploads.admitted(identity, body.length):
        options, read_latents = await body.read()
        if name is not None:
            if options.get("job_id", name) != name:
                raise InvalidOption(f"job_id and the path name two jobs; the path has {name[:80]!r}", field="job_id")
            options["job_id"] = name
        job, new = await jobs.submit(gateway, identity, read_latents, options)
    wait_s = preferred_wait_s(request)
    applied = {}
    if wait_s is not None:
        applied["Preference-Applied"] = f"wait={min(wait_s, gateway.own.wait_s):g}"
        if not job.status.is_terminal:
            job = await waited(request, job, wait_s)
    status = 200 if not new else 201 if wait_s is not None and job.status.is_terminal else 202
    return await _answer(gateway, identity, job, status=status, made=True, headers=applied)


async def _batch_item(request: web.Request, parts: Parts, part: BodyPartReader, form: dict[str, Any]) -> BatchItem:
    gateway, identity = jobs.context(request)
    name = None
    try:
        options = options_of_json(form, besides=("shape", "dtype"))
        name = options["job_id"] = options.get("job_id") or new_job_id()
        read_latents = parts.latents(part, form)
        job, _ = await jobs.submit(gateway, identity, read_latents, options)
        (shown,) = await gateway.client.run(show_jobs, gateway.client.store, [job], identity)
        return BatchItem(job=shown)
    except (BadRequest, UploadTooSlow):  # nothing after this can be read
        raise
    except LatentqError as error:
        refusal = error
    except Exception:  # the jobs before it were accepted, and must be told
        logger.error("%s broke at a job", request.path, exc_info=True, extra={"action": "request_broke"})
        refusal = InternalError()
    refusal.job_id = refusal.job_id or name
    return BatchItem(error=problem(as_told(refusal, identity), instance=request.path))


async def _answer(
    gateway: Gateway,
    identity: Identity,
    job: JobSnapshot,
    *,
    status: int,
    made: bool = False,
    headers: dict[str, str] | None = None,
) -> web.Response:
    shown: Job
    (shown,) = await gateway.client.run(show_jobs, gateway.client.store, [job], identity)
    told = dict(headers or {})
    if made:
        told["Location"] = job_url(shown.id)
    if not job.status.is_terminal:
        told["Retry-After"] = _LOOK_AGAIN
    told["Cache-Control"] = "no-store"
    return json_response(shown, status=status, headers=told)
