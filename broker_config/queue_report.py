"""What the queues hold and who works on them: depths, ages, workers, totals, leases, as they stand now.

Reads only. Each report takes two or three round trips, whatever the number of queues, and reads the lengths of
lists, not the lists. The parts of one report may be some milliseconds apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

from broker_config import keys
from broker_config.answers import pipelined, readable, text, time_ms
from broker_config.connection import Connections, broker_errors
from broker_config.keys import Priority

#: Ids at the head of a queue among which the oldest is looked for: jobs that came back go to the head, too.
_HEAD: Final = 16
#: Parked jobs that are attributed to their queues.
_PARKED_LIMIT: Final = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueState:
    """One queue."""

    #: Name in the catalogue.
    vae: str
    priority: Priority
    #: Jobs that wait for a worker.
    queued: int
    #: Jobs that a worker holds.
    processing: int
    #: Jobs that wait for a worker that knows a newer message.
    parked: int
    #: Failed jobs whose latents are retained.
    failed: int
    #: Seconds since the job that waits longest was submitted; None: none waits.
    oldest_s: float | None
    #: Whether `latentq pause` holds its jobs back.
    paused: bool
    #: Live workers that serve its VAE.
    workers: int

    @property
    def name(self) -> str:
        """RQ's name of the queue."""
        return keys.queue_name(self.vae, self.priority)

    @property
    def unfinished(self) -> int:
        """Jobs that have not ended."""
        return self.queued + self.processing + self.parked


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerState:
    """One live worker, as it last reported."""

    name: str
    vaes: tuple[str, ...]
    device: str
    pid: int
    #: Seconds its device decoded, and waited, since it started.
    busy_s: float
    idle_s: float
    #: Jobs done since it started.
    jobs: int
    #: Jobs whose lease it holds.
    held: int
    #: Seconds since the report.
    seen_s: float

    @property
    def busy_share(self) -> float | None:
        """Share of its life in which the device decoded; None: it has not run yet."""
        whole = self.busy_s + self.idle_s
        return self.busy_s / whole if whole > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """What admission counts: jobs that have not ended, their latents, and the bytes their results may take."""

    jobs: int
    latents_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseState:
    """Leases, and the janitor that ends them."""

    held: int
    #: Leases that ended more than the asked-for seconds ago, the longest ended first; at most 10 ids.
    overdue: int
    overdue_ids: tuple[str, ...]
    #: The janitor that leads; None: none does.
    janitor: str | None
    #: Seconds since anyone looked at the leases; None: not within the last hour.
    reaped_s: float | None
    #: Seconds until leases count again after an outage; 0: they count.
    grace_s: float


class QueueReport:
    """Reads the state of one broker's queues."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def queues(self, vae: str | None = None) -> list[QueueState]:
        """Every queue that ever had a job, by VAE, most urgent first; a paused VAE without one shows its `normal`."""
        names, paused, parked, now_ms = self._index()
        if vae is not None:
            names, paused = [item for item in names if item[0] == vae], paused & {vae}
        known = {name for name, _ in names}
        names += [(name, Priority.NORMAL) for name in sorted(paused - known)]
        pairs = sorted(names, key=lambda item: (item[0], list(Priority).index(item[1])))
        with self._pipeline() as pipe:
            for name, priority in pairs:
                queue = keys.queue_name(name, priority)
                pipe.llen(keys.rq_queue(queue))
                pipe.lrange(keys.rq_queue(queue), 0, _HEAD - 1)
                pipe.zcard(keys.rq_registry("wip", queue))
                pipe.zcard(keys.rq_registry("failed", queue))
                pipe.zcount(keys.serving(name), now_ms, "+inf")
            flat = pipe.execute()
        answers = [flat[start : start + 5] for start in range(0, len(flat), 5)]
        since = self._oldest_ms([heads for _, heads, *_ in answers])
        return [
            QueueState(
                vae=name,
                priority=priority,
                queued=depth,
                processing=wip,
                parked=parked.get(keys.queue_name(name, priority), 0),
                failed=failed,
                oldest_s=None if oldest is None else max(0.0, (now_ms - oldest) / 1000),
                paused=name in paused,
                workers=serving,
            )
            for (name, priority), (depth, _, wip, failed, serving), oldest in zip(pairs, answers, since, strict=True)
        ]

    def workers(self, vaes: Iterable[str] = ()) -> list[WorkerState]:
        """Every live worker, by name. `vaes`: where to look besides RQ's list of workers."""
        names = {name for name, _ in self._index()[0]} | set(vaes)
        with self._pipeline() as pipe:
            pipe.time()
            pipe.smembers(keys.RQ_WORKERS)
            for vae in names:
                pipe.zrange(keys.serving(vae), 0, -1)
            now, registered, *serving = pipe.execute()
        prefix = keys.rq_worker("")
        found = {text(key).removeprefix(prefix) for key in registered}
        found |= {text(name) for part in serving for name in part}
        ordered = sorted(found)
        with self._pipeline() as pipe:
            for name in ordered:
                pipe.hmget(keys.worker(name), "report", "seen_ms")
            answers = pipe.execute()
        now_ms = time_ms(now)
        return [
            _worker(name, report, seen_s=max(0.0, (now_ms - int(seen)) / 1000))
            for name, (report, seen) in zip(ordered, answers, strict=True)
            if report is not None and seen is not None  # else it is dead, or not one of ours
        ]

    def totals(self) -> Totals:
        """What admission counts."""
        with broker_errors(self._connections.url):
            return totals_of(self._connections.commands.hgetall(keys.TOTALS))

    def leases(self, *, slack_s: float) -> LeaseState:
        """Leases, and those among them that ended more than `slack_s` ago and were not dealt with."""
        now_ms = self._now_ms()
        due = now_ms - round(slack_s * 1000)
        with self._pipeline() as pipe:
            pipe.zcard(keys.LEASES)
            pipe.zcount(keys.LEASES, "-inf", due)
            pipe.zrangebyscore(keys.LEASES, "-inf", due, start=0, num=10)
            pipe.get(keys.JANITOR)
            pipe.hmget(keys.REAPER, "at_ms", "grace_ms")
            held, overdue, ids, janitor, (at_ms, grace_ms) = pipe.execute()
        return LeaseState(
            held=held,
            overdue=overdue,
            overdue_ids=tuple(text(job_id) for job_id in ids),
            janitor=None if janitor is None else text(janitor),
            reaped_s=None if at_ms is None else max(0.0, (now_ms - int(at_ms)) / 1000),
            grace_s=max(0.0, (int(grace_ms or 0) - now_ms) / 1000),
        )

    def suspended(self) -> bool:
        """Whether someone suspended all workers with RQ's own `rq suspend`."""
        with broker_errors(self._connections.url):
            return bool(self._connections.commands.exists(keys.RQ_SUSPENDED))

    def _index(self) -> tuple[list[tuple[str, Priority]], set[str], dict[str, int], int]:
        """Queues as (VAE, priority), paused VAEs, parked jobs by queue, and the time."""
        with self._pipeline() as pipe:
            pipe.smembers(keys.RQ_QUEUES)
            pipe.smembers(keys.PAUSED)
            pipe.zrange(keys.PARKED, 0, _PARKED_LIMIT - 1)
            pipe.time()
            queue_keys, paused, parked_ids, now = pipe.execute()
        names = []
        for key in queue_keys:
            vae, priority = keys.split_queue_name(text(key).removeprefix(keys.rq_queue("")))
            if vae and priority in set(Priority) and text(key) == keys.rq_queue(keys.queue_name(vae, priority)):
                names.append((vae, Priority(priority)))
        parked: dict[str, int] = {}
        if parked_ids:
            with self._pipeline() as pipe:
                for job_id in parked_ids:
                    pipe.hget(keys.job(text(job_id)), "rq_queue")
                for queue in readable(pipe):
                    if queue is not None:
                        parked[text(queue)] = parked.get(text(queue), 0) + 1
        return names, {text(vae) for vae in paused}, parked, time_ms(now)

    def _oldest_ms(self, heads: Sequence[Sequence[bytes]]) -> list[int | None]:
        """When the oldest job among each queue's first ids was submitted; ids that do not wait do not count."""
        with self._pipeline() as pipe:
            for ids in heads:
                for job_id in ids:
                    pipe.hmget(keys.job(text(job_id)), "state", "submitted_ms")
            records = iter(readable(pipe))
        oldest = []
        for ids in heads:
            own = [next(records) or (None, None) for _ in ids]
            times = [int(submitted) for state, submitted in own if state == b"queued" and submitted]
            oldest.append(min(times, default=None))
        return oldest

    def _now_ms(self) -> int:
        with broker_errors(self._connections.url):
            return time_ms(self._connections.commands.time())

    def _pipeline(self) -> AbstractContextManager[Any]:
        return pipelined(self._connections)


def totals_of(raw: Mapping[Any, Any]) -> Totals:
    """The hash of totals, as numbers."""
    return Totals(
        jobs=int(raw.get(b"jobs") or 0),
        latents_bytes=int(raw.get(b"latents_bytes") or 0),
        reserved_bytes=int(raw.get(b"reserved_bytes") or 0),
    )


def _worker(name: str, report: bytes, *, seen_s: float) -> WorkerState:
    # Written by a worker of perhaps another version: a field it lacks is not a reason to show nothing.
    told = json.loads(report)
    return WorkerState(
        name=name,
        vaes=tuple(told.get("vaes", ())),
        device=str(told.get("device", "?")),
        pid=int(told.get("pid", 0)),
        busy_s=float(told.get("busy_s", 0)),
        idle_s=float(told.get("idle_s", 0)),
        jobs=int(told.get("jobs", 0)),
        held=int(told.get("held", 0)),
        seen_s=seen_s,
    )
