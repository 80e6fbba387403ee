"""Which jobs there are: found through an index by time and RQ's queues and registries, never by walking over the
broker's keys.

DESIGN. RQ's lists are not in the order of submission: a retry goes to the end of its queue, and registries are ordered
by the end of retention, which jobs choose. So the order is that of `latentq:submitted`. Jobs of one state or VAE are
taken from RQ's lists and put in that order while they are few; else the index is walked, so much of it for one page,
and the page says where the next one goes on. An expired job is a tombstone and on no list: ask for it by its id.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker_config import keys
from broker_config.answers import pipelined, readable, text, time_ms
from broker_config.connection import Connections, broker_errors
from broker_config.errors import InvalidOption, UnsupportedMessage
from broker_config.job_status import JobStatus
from broker_config.messages import DecodeRequest
from broker_config.queue_report import QueueReport

#: Where jobs of a state are listed: RQ's registry; None: the queue itself.
_LISTS: Final = {
    JobStatus.QUEUED: None,
    JobStatus.PROCESSING: "wip",
    JobStatus.SUCCEEDED: "finished",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELED: "canceled",
}
#: Jobs of a state or VAE that are put in order for a page.
_FEW: Final = 5000
#: Entries of the index that are looked at for one page, if the jobs asked for are more than that.
_LOOKED_AT: Final = 5000
#: Records read in one round trip.
_CHUNK: Final = 200
_FIELDS: Final = (
    "state", "vae", "rq_queue", "message", "submitted_ms", "started_ms", "ended_ms", "expires_ms", "attempts",
    "worker", "latents_bytes",
)  # fmt: skip


#: When a job was accepted, ms, and its id: what lists are ordered by.
Entry = tuple[int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRow:
    """One job of a list. Unlike a `JobSnapshot` it can also be made of a job whose message is too new to be read."""

    job_id: str
    status: JobStatus
    vae: str
    priority: str
    #: None: the message is of a newer version, or the retention has ended.
    request: DecodeRequest | None
    latents_bytes: int
    #: Milliseconds since the epoch by the broker's clock; 0: not yet.
    submitted_ms: int
    started_ms: int
    ended_ms: int
    #: Seconds since it was submitted.
    age_s: float
    attempts: int
    #: The worker of the last attempt.
    worker: str | None
    #: The last attempt's error; None: none ended with one.
    error_code: str | None
    error_message: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobPage:
    """Some jobs, newest first."""

    rows: list[JobRow]
    #: Where the next page begins; None: there are no more.
    before: Entry | None


class JobList:
    """Lists the jobs of one broker."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._report = QueueReport(connections)

    def newest(
        self, *, status: JobStatus | None = None, vae: str | None = None, limit: int = 20, pages: int | None = None
    ) -> list[JobRow]:
        """Jobs by the time they were accepted, newest first. Arguments and errors as `page`; `pages`: most that are
        looked at; None: until there are no more.
        """
        rows: list[JobRow] = []
        before: Entry | None = None
        for _ in itertools.count() if pages is None else range(pages):
            found = self.page(status=status, vae=vae, limit=limit - len(rows), before=before)
            rows += found.rows
            before = found.before
            if len(rows) == limit or before is None:
                break
        return rows

    def page(
        self,
        *,
        status: JobStatus | None = None,
        vae: str | None = None,
        limit: int = 20,
        before: Entry | None = None,
    ) -> JobPage:
        """Jobs by the time they were accepted, newest first. A page may have fewer than there are.

        Args:
            status: in this state only.
            vae: of this VAE only.
            limit: how many, 1 or more.
            before: only jobs older than this one; `before` of the last page.

        Raises:
            InvalidOption: `status` is `expired`.
        """
        if status is JobStatus.EXPIRED:
            raise InvalidOption("expired jobs are on no list: ask for one with `latentq status ID`", field="status")
        few = None if status is None and vae is None else self._few(status, vae=vae)
        chunks = self._walk(before) if few is None else self._ordered(few, before)
        rows: list[JobRow] = []
        last = looked_at = before
        for chunk in chunks:
            found = {row.job_id: row for row in self.rows([job_id for _, job_id in chunk])}
            self._forget([job_id for _, job_id in chunk if job_id not in found])
            for looked_at in chunk:
                row = found.get(looked_at[1])
                if row is None or status not in (None, row.status) or vae not in (None, row.vae):
                    continue
                if len(rows) == limit:
                    return JobPage(rows=rows, before=last)
                rows.append(row)
                last = looked_at
            if len(chunk) < _CHUNK:
                return JobPage(rows=rows, before=None)
        return JobPage(rows=rows, before=looked_at)

    def failed(self, vae: str | None = None) -> Iterator[JobRow]:
        """Every failed job whose latents are retained, those whose retention ends first at the front."""
        with pipelined(self._connections) as pipe:
            for queue in self._report.queues(vae):
                pipe.zrange(keys.rq_registry("failed", queue.name), 0, -1, withscores=True)
            entries = [(float(score), text(job_id)) for part in pipe.execute() for job_id, score in part]
        ids = [job_id for _, job_id in sorted(entries)]
        for start in range(0, len(ids), _CHUNK):
            yield from (row for row in self.rows(ids[start : start + _CHUNK]) if row.status is JobStatus.FAILED)

    def rows(self, job_ids: Sequence[str]) -> list[JobRow]:
        """These jobs, as far as the broker knows them, in the same order."""
        with pipelined(self._connections) as pipe:
            pipe.time()
            for job_id in job_ids:
                pipe.hmget(keys.job(job_id), *_FIELDS)
                pipe.lindex(keys.attempts(job_id), -1)
            now, *answers = readable(pipe)
        now_ms = time_ms(now)
        return [
            _row(job_id, values, error, now_ms=now_ms)
            for job_id, values, error in zip(job_ids, answers[::2], answers[1::2], strict=True)
            if values is not None and values[0] is not None
        ]

    def _few(self, status: JobStatus | None, *, vae: str | None) -> list[str] | None:
        """The jobs on the lists of a state, or of all, and of a VAE, or of all; None: they are too many to compare."""
        wanted = list(_LISTS) if status is None else [status]
        names = [queue.name for queue in self._report.queues(vae)]
        registries = [
            keys.rq_registry(registry, name) for name in names for kind in wanted if (registry := _LISTS[kind])
        ]
        waiting = [keys.rq_queue(name) for name in names] if JobStatus.QUEUED in wanted else []
        if waiting:
            registries.append(keys.PARKED)
        with pipelined(self._connections) as pipe:
            for name in registries:
                pipe.zcard(name)
            for name in waiting:
                pipe.llen(name)
            if sum(pipe.execute()) > _FEW:
                return None
            for name in registries:
                pipe.zrange(name, 0, _FEW)
            for name in waiting:
                pipe.lrange(name, 0, _FEW)
            answers = pipe.execute()
        # Members of `wip` are `<id>:<execution>`. A dict: each id once.
        return list(dict.fromkeys(text(item).partition(":")[0] for part in answers for item in part))

    def _ordered(self, job_ids: Sequence[str], before: Entry | None) -> Iterator[list[Entry]]:
        """These jobs in the order of the index, newest first; the last part is shorter than the others."""
        if not job_ids:
            yield []
            return
        with broker_errors(self._connections.url):
            times: Any = self._connections.commands.zmscore(keys.SUBMITTED, list(job_ids))
        entries = sorted(
            ((int(time), job_id) for time, job_id in zip(times, job_ids, strict=True) if time is not None), reverse=True
        )
        if before is not None:
            entries = [entry for entry in entries if entry < before]
        for start in range(0, len(entries) + 1, _CHUNK):
            yield entries[start : start + _CHUNK]

    def _walk(self, before: Entry | None) -> Iterator[list[Entry]]:
        """The index, newest first, as much as one page may look at; the last part of all is shorter than the others."""
        for _ in range(_LOOKED_AT // _CHUNK):
            highest = "+inf" if before is None else before[0]
            with broker_errors(self._connections.url):
                raw: Any = self._connections.commands.zrange(
                    keys.SUBMITTED, highest, "-inf", desc=True, byscore=True, offset=0, num=2 * _CHUNK, withscores=True
                )
            entries = [(int(score), text(member)) for member, score in raw]
            chunk = [entry for entry in entries if before is None or entry < before][:_CHUNK]
            yield chunk
            if chunk:
                before = chunk[-1]

    def _forget(self, job_ids: Sequence[str]) -> None:
        """Takes off the index whose records someone deleted or wrote over."""
        if job_ids:
            with broker_errors(self._connections.url):
                self._connections.commands.zrem(keys.SUBMITTED, *job_ids)


def _row(job_id: str, values: Sequence[bytes | None], error: bytes | None, *, now_ms: int) -> JobRow:
    record = {name: text(value) for name, value in zip(_FIELDS, values, strict=True) if value is not None}
    status = JobStatus(record["state"])
    expires_ms = int(record.get("expires_ms") or 0)
    if status.is_terminal and 0 < expires_ms < now_ms:
        status = JobStatus.EXPIRED  # due, though the janitor has not come by yet
    told: dict[str, Any] = json.loads(error) if error else {}
    return JobRow(
        job_id=job_id,
        status=status,
        vae=record["vae"],
        priority=keys.split_queue_name(record["rq_queue"])[1],
        request=_request(record.get("message")),
        latents_bytes=int(record.get("latents_bytes") or 0),
        submitted_ms=int(record["submitted_ms"]),
        started_ms=int(record.get("started_ms") or 0),
        ended_ms=int(record.get("ended_ms") or 0),
        age_s=max(0.0, (now_ms - int(record["submitted_ms"])) / 1000),
        attempts=int(record.get("attempts") or 0),
        worker=record.get("worker") or None,
        error_code=told.get("code"),
        error_message=told.get("message"),
    )


def _request(message: str | None) -> DecodeRequest | None:
    if message is None:
        return None
    try:
        return DecodeRequest.from_wire(message)
    except UnsupportedMessage:
        return None
