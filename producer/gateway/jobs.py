"""What handlers do with jobs, for one identity: submit, find, list."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from broker_config import keys
from broker_config.connection import broker_errors
from broker_config.errors import InvalidOption, JobNotFound
from broker_config.job_store import JobStore
from broker_config.messages import JobSnapshot, JobStatus
from broker_config.queue_report import pipelined
from producer.client import DecodeClient
from producer.gateway.api_keys import ApiKey, Scope
from producer.gateway.context import GATEWAY, IDENTITY, Gateway
from producer.gateway.identity import Identity
from producer.gateway.latents_input import Check, refused_early
from producer.gateway.looking import snapshots_of
from producer.submission import new_job_id
from producer.submit_attempt import SubmitAttempt
from producer.tensor_input import TensorFile

#: Makes a checked request of latents, or of pictures, and the options of the job.
Begin = Callable[..., SubmitAttempt]
#: Reads the latents once `Check` has said yes.
ReadLatents = Callable[[Check], Awaitable[TensorFile]]

_CURSOR = re.compile(r"(\d{1,15})-([A-Za-z0-9_-]{1,64})")
#: Ids of a key's list looked at for one page: a filter that fits few jobs must not read all of them.
_LOOKED_AT: Final = 1000
_CHUNK: Final = 200
#: How long a job may wait before its end without its key's list forgetting it.
_PENDING_S: Final = 30 * 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Some jobs, newest first."""

    jobs: list[JobSnapshot]
    #: None: there are no more.
    cursor: str | None


def context(request: web.Request) -> tuple[Gateway, Identity]:
    """What a handler works with."""
    return request.app[GATEWAY], request[IDENTITY]


async def submit(
    gateway: Gateway, identity: Identity, read: ReadLatents, options: dict[str, Any], *, begin: Begin | None = None
) -> tuple[JobSnapshot, bool]:
    """Accepts a job: the job, and whether it is new.

    Args:
        gateway: what it goes through.
        identity: whose it is.
        read: reads the latents.
        options: of the job; `job_id` is the client's name for it.
        begin: makes the request; None: a decode.

    Raises:
        NotAllowed: no scope for it.
        RateLimited, QuotaExceeded: too many of them.
        InvalidJob, JobConflict, BrokerError: as `DecodeClient.submit`.
    """
    identity.require(Scope.SUBMIT)
    client = gateway.client
    job_id = identity.new_id(options.get("job_id") or new_job_id())
    asked = options | {"job_id": job_id}
    if identity.key is not None:
        await client.run(gateway.throttle.spend, identity.key)

    begin = begin or functools.partial(_decode, client.blocking)

    def check(tensor: TensorFile) -> None:
        refused_early(lambda announced: begin(announced, **asked), tensor)

    tensor = await read(check)
    attempt = await client.transfer(begin, tensor, **asked)
    if identity.key is not None:
        await client.run(_enter, client.store, gateway, identity.key, job_id)
    new = await client.transfer(attempt.once)
    return await client.job(job_id).snapshot(), new


def _decode(client: DecodeClient, tensor: TensorFile, **options: Any) -> SubmitAttempt:
    return client.attempt(lambda: tensor, **options)


async def redecode(
    gateway: Gateway, identity: Identity, source: JobSnapshot, options: dict[str, Any]
) -> tuple[JobSnapshot, bool]:
    """Decodes a job's latents again. Errors as `submit`, and `ResultExpired`."""
    identity.require(Scope.SUBMIT)
    client = gateway.client
    job_id = identity.new_id(options.get("job_id") or new_job_id())
    if identity.key is not None:
        await client.run(gateway.throttle.spend, identity.key)
    attempt = await client.run(client.blocking.redecode_attempt, source.job_id, **options | {"job_id": job_id})
    if identity.key is not None:
        await client.run(_enter, client.store, gateway, identity.key, job_id)
    new = await client.run(attempt.once)
    return await client.job(job_id).snapshot(), new


async def find(gateway: Gateway, identity: Identity, name: str) -> JobSnapshot:
    """The job that this identity calls so.

    Raises:
        JobNotFound: there is none that it may see.
        NotAllowed: it may see none at all.
    """
    identity.require(Scope.READ)
    for job_id in identity.candidates(name):
        try:
            return await gateway.client.job(job_id).snapshot()
        except JobNotFound:
            continue
    raise JobNotFound(f"no job {name}: the id is wrong, or its tombstone is gone too", job_id=name)


async def find_to_change(gateway: Gateway, identity: Identity, name: str) -> JobSnapshot:
    """As `find`, for someone who wants to cancel, delete or decode it again.

    Raises:
        NotAllowed: it may only look.
    """
    job = await find(gateway, identity, name)
    if not identity.may_change(job.job_id):
        identity.require(Scope.SUBMIT)
        identity.require(Scope.ADMIN)
    return job


def page_of(
    gateway: Gateway, identity: Identity, *, status: JobStatus | None, vae: str | None, limit: int, cursor: str | None
) -> Page:
    """A page of the jobs that this identity may see. Asks the broker: call it in a thread."""
    before = _before(cursor)
    store = gateway.client.store
    if identity.sees_all:
        rows = gateway.operations.jobs.newest(status=status, vae=vae, limit=limit + 1, before=before)
        ids = [row.job_id for row in rows[:limit]]
        more = len(rows) > limit
        last = f"{rows[limit - 1].submitted_ms}-{rows[limit - 1].job_id}" if more else None
        return Page(jobs=snapshots_of(store, ids), cursor=last)
    assert identity.key is not None
    return _own_page(store, identity.key, status=status, vae=vae, limit=limit, before=before)


def _own_page(
    store: JobStore,
    key: ApiKey,
    *,
    status: JobStatus | None,
    vae: str | None,
    limit: int,
    before: tuple[int, str] | None,
) -> Page:
    jobs: list[JobSnapshot] = []
    for _ in range(_LOOKED_AT // _CHUNK):
        entries = _entries(store, key, before=before)
        found = {job.job_id: job for job in snapshots_of(store, [job_id for _, job_id in entries])}
        for entry in entries:
            before = entry
            job = found.get(entry[1])
            if job is not None and status in (None, job.status) and vae in (None, job.vae):
                jobs.append(job)
                if len(jobs) == limit:
                    return Page(jobs=jobs, cursor=f"{entry[0]}-{entry[1]}")
        if len(entries) < _CHUNK:
            return Page(jobs=jobs, cursor=None)
    assert before is not None
    return Page(jobs=jobs, cursor=f"{before[0]}-{before[1]}")


def _entries(store: JobStore, key: ApiKey, *, before: tuple[int, str] | None) -> list[tuple[int, str]]:
    """The next entries of a key's list, newest first; equal times in the reverse order of their ids."""
    highest = "+inf" if before is None else before[0]
    with broker_errors(store.connections.url):
        raw: Any = store.connections.commands.zrange(
            keys.index(key.id), highest, "-inf", desc=True, byscore=True, offset=0, num=2 * _CHUNK, withscores=True
        )
    entries = [(int(score), member.decode()) for member, score in raw]
    return [entry for entry in entries if before is None or entry < before][:_CHUNK]


def _enter(store: JobStore, gateway: Gateway, key: ApiKey, job_id: str) -> None:
    """Puts a job on its key's list, before it is submitted: an entry without a job is passed over, a job without an
    entry would be on no list.
    """
    now_ms = round(time.time() * 1000)
    kept_ms = round((gateway.settings.retention_s + gateway.settings.tombstone_s + _PENDING_S) * 1000)
    name = keys.index(key.id)
    with pipelined(store.connections) as pipe:
        pipe.zadd(name, {job_id: now_ms}, nx=True)
        pipe.zremrangebyscore(name, "-inf", now_ms - kept_ms)
        pipe.pexpire(name, kept_ms)
        pipe.execute()


def _before(cursor: str | None) -> tuple[int, str] | None:
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidOption("cursor is none that a page had: leave it out to begin anew", field="cursor")
    return int(match[1]), match[2]
