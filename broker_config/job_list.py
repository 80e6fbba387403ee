"""Which jobs there are: found through RQ's queues and registries, never by walking over the broker's keys.

An expired job is a tombstone and on no list: ask for it by its id.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from broker_config import keys
from broker_config.connection import Connections
from broker_config.errors import InvalidOption, UnsupportedMessage
from broker_config.messages import DecodeRequest, JobStatus
from broker_config.queue_report import QueueReport, pipelined, text, time_ms

#: Where jobs of a state are listed: RQ's registry; None: the queue itself.
_LISTS: Final = {
    JobStatus.QUEUED: None,
    JobStatus.PROCESSING: "wip",
    JobStatus.SUCCEEDED: "finished",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELED: "canceled",
}
#: How many of each list are compared. The lists are not quite in the order of submission: a retry goes to the end
#: of its queue, and registries are ordered by the end of retention.
_WINDOW: Final = 200
#: The same for pages after the first.
_DEEP_WINDOW: Final = 5000
#: Records read in one round trip.
_CHUNK: Final = 500
_FIELDS: Final = (
    "state", "vae", "rq_queue", "message", "submitted_ms", "started_ms", "ended_ms", "expires_ms", "attempts",
    "worker", "latents_bytes",
)  # fmt: skip


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


class JobList:
    """Lists the jobs of one broker."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._report = QueueReport(connections)

    def newest(
        self,
        *,
        status: JobStatus | None = None,
        vae: str | None = None,
        limit: int = 20,
        before: tuple[int, str] | None = None,
    ) -> list[JobRow]:
        """Jobs by the time they were submitted, newest first. Looks at 200 (or `limit`) of each list.

        Args:
            status: in this state only.
            vae: of this VAE only.
            limit: how many.
            before: only jobs older than the one submitted at this time (ms) with this id; looks at 5,000 of each list.

        Raises:
            InvalidOption: `status` is `expired`.
        """
        if status is JobStatus.EXPIRED:
            raise InvalidOption("expired jobs are on no list: ask for one with `latentq status ID`", field="status")
        wanted = [status] if status is not None else list(_LISTS)
        found = self._ids(wanted, vae=vae, window=max(limit, _WINDOW) if before is None else _DEEP_WINDOW)
        with pipelined(self._connections) as pipe:
            for job_id in found:
                pipe.hget(keys.job(job_id), "submitted_ms")
            times = pipe.execute()
        ages = sorted(((int(time), job_id) for time, job_id in zip(times, found, strict=True) if time), reverse=True)
        if before is not None:
            ages = [item for item in ages if item < before]
        rows: list[JobRow] = []
        for start in range(0, len(ages), _CHUNK):
            rows += [
                row
                for row in self.rows([job_id for _, job_id in ages[start : start + _CHUNK]])
                if status is None or row.status is status
            ]
            if len(rows) >= limit:
                break
        return rows[:limit]

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
            now, *answers = pipe.execute()
        now_ms = time_ms(now)
        return [
            _row(job_id, values, error, now_ms=now_ms)
            for job_id, values, error in zip(job_ids, answers[::2], answers[1::2], strict=True)
            if values[0] is not None
        ]

    def _ids(self, wanted: Sequence[JobStatus], *, vae: str | None, window: int) -> list[str]:
        with pipelined(self._connections) as pipe:
            for queue in self._report.queues(vae):
                for status in wanted:
                    registry = _LISTS[status]
                    if registry is None:
                        pipe.lrange(keys.rq_queue(queue.name), -window, -1)
                    else:
                        pipe.zrange(keys.rq_registry(registry, queue.name), 0, window - 1, desc=True)
            if JobStatus.QUEUED in wanted:
                pipe.zrange(keys.PARKED, 0, window - 1)
            answers = pipe.execute()
        # Members of `wip` are `<id>:<execution>`. A dict: each id once, in order.
        ids = list(dict.fromkeys(text(item).partition(":")[0] for part in answers for item in part))
        return ids


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
