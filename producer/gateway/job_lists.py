"""The jobs that one identity sees, newest first: a page of them, or the newest of some states. Asks the broker: call it
in a thread.

DESIGN. A key's own jobs are on a list of its own, in which an entry outlives its job's tombstone, and a submit that
broke off may leave one as well. Such entries are passed over, and taken off the list by whoever comes by. However long
the list is, one look at it reads a thousand entries at most, in five round trips.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker_config import keys
from broker_config.connection import broker_errors
from broker_config.errors import InvalidOption
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from producer.gateway.api_keys import ApiKey
from producer.gateway.context import Gateway
from producer.gateway.identity import Identity

#: When a job was entered, ms, and its id.
Entry = tuple[int, str]

_CURSOR = re.compile(r"(\d{1,15})-([A-Za-z0-9_-]{1,64})")
#: Entries of a key's list looked at for one page: a filter that fits few jobs must not read all of them.
_LOOKED_AT: Final = 1000
_CHUNK: Final = 200
#: The same of everyone's jobs, in pages of `JobList`, for the newest of a state.
_PAGES: Final = 4
#: A submit is on the list before it is accepted, and its latents may take their time to the store of large blobs.
_UNDER_WAY_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Some jobs, newest first."""

    jobs: list[JobSnapshot]
    #: None: there are no more.
    cursor: str | None


def page_of(
    gateway: Gateway, identity: Identity, *, status: JobStatus | None, vae: str | None, limit: int, cursor: str | None
) -> Page:
    """A page of the jobs that this identity may see."""
    before = _before(cursor)
    store = gateway.client.store
    if identity.sees_all:
        page = gateway.operations.jobs.page(status=status, vae=vae, limit=limit, before=before)
        jobs = list(store.find([row.job_id for row in page.rows]).values())
        return Page(jobs=jobs, cursor=page.before and f"{page.before[0]}-{page.before[1]}")
    assert identity.key is not None
    jobs = []
    for chunk in _chunks(store, identity.key, before):
        for entry, job in chunk:
            before = entry
            if job is not None and status in (None, job.status) and vae in (None, job.vae):
                jobs.append(job)
                if len(jobs) == limit:
                    return Page(jobs=jobs, cursor=f"{entry[0]}-{entry[1]}")
        if len(chunk) < _CHUNK:
            return Page(jobs=jobs, cursor=None)
    assert before is not None
    return Page(jobs=jobs, cursor=f"{before[0]}-{before[1]}")


def newest(gateway: Gateway, identity: Identity, limits: Mapping[JobStatus, int]) -> dict[JobStatus, list[JobSnapshot]]:
    """The newest jobs in these states that this identity may see, at most so many of each."""
    store = gateway.client.store
    if identity.sees_all:
        listed = gateway.operations.jobs
        rows = {status: listed.newest(status=status, limit=limit, pages=_PAGES) for status, limit in limits.items()}
        return {status: list(store.find([row.job_id for row in found]).values()) for status, found in rows.items()}
    assert identity.key is not None
    found: dict[JobStatus, list[JobSnapshot]] = {status: [] for status in limits}
    for chunk in _chunks(store, identity.key, None):
        for _, job in chunk:
            if job is not None and job.status in limits and len(found[job.status]) < limits[job.status]:
                found[job.status].append(job)
        if len(chunk) < _CHUNK or all(len(found[status]) == limit for status, limit in limits.items()):
            break
    return found


def _chunks(store: JobStore, key: ApiKey, before: Entry | None) -> Iterator[list[tuple[Entry, JobSnapshot | None]]]:
    """A key's list, newest first, with the job of each entry; one that is shorter than the others is the last."""
    for _ in range(_LOOKED_AT // _CHUNK):
        entries = _entries(store, key, before=before)
        found = store.find([job_id for _, job_id in entries])
        settled_ms = (time.time() - _UNDER_WAY_S) * 1000
        dead = [job_id for entered_ms, job_id in entries if job_id not in found and entered_ms < settled_ms]
        if dead:
            with broker_errors(store.connections.url):
                store.connections.commands.zrem(keys.index(key.id), *dead)
        yield [(entry, found.get(entry[1])) for entry in entries]
        if not entries:
            return
        before = entries[-1]


def _entries(store: JobStore, key: ApiKey, *, before: tuple[int, str] | None) -> list[tuple[int, str]]:
    """The next entries of a key's list, newest first; equal times in the reverse order of their ids."""
    highest = "+inf" if before is None else before[0]
    with broker_errors(store.connections.url):
        raw: Any = store.connections.commands.zrange(
            keys.index(key.id), highest, "-inf", desc=True, byscore=True, offset=0, num=2 * _CHUNK, withscores=True
        )
    entries = [(int(score), member.decode()) for member, score in raw]
    return [entry for entry in entries if before is None or entry < before][:_CHUNK]


def _before(cursor: str | None) -> tuple[int, str] | None:
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidOption("cursor is none that a page had: leave it out to begin anew", field="cursor")
    return int(match[1]), match[2]
