"""What handlers do with jobs, for one identity: submit and find."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from aiohttp import web

from broker_config.errors import BrokerUnreachable, JobNotFound, LatentqError
from broker_config.job_record import JobSnapshot
from producer.client import DecodeClient
from producer.gateway.api_keys import Scope
from producer.gateway.context import GATEWAY, IDENTITY, Gateway
from producer.gateway.identity import Identity
from producer.gateway.latents_input import Check, refused_early
from producer.submission import new_job_id
from producer.submit_attempt import RedecodeAttempt, SubmitAttempt
from producer.tensor_input import TensorFile

#: Makes a checked request of latents, or of pictures, and the options of the job.
Begin = Callable[..., SubmitAttempt]
#: Reads the latents once `Check` has said yes.
ReadLatents = Callable[[Check], Awaitable[TensorFile]]

#: Runs a call in a thread.
Run = Callable[..., Awaitable[Any]]

#: How long a job may wait before its end without its key's list forgetting it.
_PENDING_S: Final = 30 * 86_400


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
    begin = begin or functools.partial(_decode, client.blocking)

    def check(tensor: TensorFile) -> None:
        refused_early(lambda announced: begin(announced, **asked), tensor)

    with _about(job_id):
        await _spend(gateway, identity, job_id)
        tensor = await read(check)
        attempt = await client.transfer(begin, tensor, **asked)
        return await _accepted(gateway, identity, attempt, client.transfer)


def _decode(client: DecodeClient, tensor: TensorFile, **options: Any) -> SubmitAttempt:
    return client.attempt(lambda: tensor, **options)


async def redecode(
    gateway: Gateway, identity: Identity, source: JobSnapshot, options: dict[str, Any]
) -> tuple[JobSnapshot, bool]:
    """Decodes a job's latents again. Errors as `submit`, and `ResultExpired`."""
    identity.require(Scope.SUBMIT)
    client = gateway.client
    job_id = identity.new_id(options.get("job_id") or new_job_id())
    with _about(job_id):
        await _spend(gateway, identity, job_id)
        attempt = await client.run(client.blocking.redecode_attempt, source.job_id, **options | {"job_id": job_id})
        return await _accepted(gateway, identity, attempt, client.run)


@contextlib.contextmanager
def _about(job_id: str) -> Iterator[None]:
    """Whatever goes wrong, the client learns the id: with it, the same submit cannot make a second job."""
    try:
        yield
    except LatentqError as error:
        error.job_id = error.job_id or job_id
        raise


async def _spend(gateway: Gateway, identity: Identity, job_id: str) -> None:
    if identity.key is not None:
        await gateway.client.run(gateway.throttle.spend, identity.key, job_id)


async def _accepted(
    gateway: Gateway, identity: Identity, attempt: SubmitAttempt | RedecodeAttempt, run: Run
) -> tuple[JobSnapshot, bool]:
    client, key, job_id = gateway.client, identity.key, attempt.job_id
    kept_s = gateway.settings.retention_s + gateway.settings.tombstone_s + _PENDING_S
    if key is not None:
        await client.run(gateway.throttle.enter, key, job_id, kept_s=kept_s)
    try:
        new = await run(attempt.once)
    except BrokerUnreachable:  # it may have been accepted
        raise
    except LatentqError:
        if key is not None:
            with contextlib.suppress(LatentqError):  # the refusal counts, not that it could not be taken back
                await client.run(gateway.throttle.withdraw, key, job_id)
        raise
    if key is not None and new:
        await client.run(gateway.throttle.enter, key, job_id, kept_s=kept_s, accepted=True)
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
