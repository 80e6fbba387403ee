"""A walk over the broker's keys that finds what should not be there: lost jobs, drifted totals, keys nobody deletes.

Reads only, for `latentq doctor`; what can be mended, the janitor mends (scripts/audit.lua).

DESIGN. The walk uses SCAN, so it never blocks the broker, is bounded, and sees keys while they change. Two things
keep it from calling a change an error. Totals are compared as of one moment: a job counts as live at that moment if
it was submitted before and has not ended, or ended later, whatever the walk sees of it now. And what looks lost is
looked at again, in one transaction, before it is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broker_config import keys
from broker_config.answers import pipelined, text, time_ms
from broker_config.connection import Connections, broker_errors
from broker_config.queue_report import Totals, totals_of

_SCAN_COUNT: Final = 1000
#: A job younger than this in its state may be between two commands of someone's tool (as worker/janitor.py).
_SETTLE_MS: Final = 5000
#: Ids read from queues to see which jobs are on them: 36 MB.
_QUEUED_LIMIT: Final = 1_000_000
#: Walks until one finds no job that was submitted or ended in the very millisecond at which totals are compared.
_TRIES: Final = 3
#: Suspects that are looked at again; what is reported is a count and a few names.
_SUSPECTS: Final = 1000
_LIVE: Final = (b"queued", b"processing")
_RQ_ENDED: Final = (b"finished", b"failed", b"canceled", b"stopped")
_FIELDS: Final = (
    "state", "rq_queue", "submitted_ms", "queued_ms", "started_ms", "ended_ms", "latents_bytes", "reserved_bytes",
)  # fmt: skip

_JOB, _RQ_JOB, _BLOB, _OWNERS, _ATTEMPTS = (
    keys.job(""), keys.rq_job(""), keys.blob(""), keys.owners(""), keys.attempts(""),
)  # fmt: skip
#: Keys that must have a TTL whatever happens (broker_config/keys.py says which).
_MORTAL: Final = (
    keys.claim_memo(""), keys.bell(""), keys.serving(""), keys.worker(""), keys.delivery(""), keys.breaker(""),
    keys.courier(""),
)  # fmt: skip
_JUDGED: Final = (_JOB, _RQ_JOB, _BLOB, _OWNERS, _ATTEMPTS, *_MORTAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobAudit:
    """What a walk found."""

    #: Keys looked at, and whether those were all.
    keys_seen: int
    complete: bool
    #: Jobs that wait, but are on no list; processing, but without a lease.
    unlisted: tuple[str, ...]
    unleased: tuple[str, ...]
    #: Keys that have neither a TTL nor a live job that owns them.
    immortal: tuple[str, ...]
    #: What admission counts, and what the records add up to; None: the walk was cut short.
    totals: Totals
    recounted: Totals | None


@dataclass(slots=True)
class _Found:
    #: The moment as of which totals are compared, and whether every job was clearly before or after it.
    at_ms: int
    is_clear: bool = True
    seen: set[str] = field(default_factory=set)
    #: Job id → RQ queue, of jobs that have been in their state for a while.
    queued: dict[str, str] = field(default_factory=dict)
    processing: set[str] = field(default_factory=set)
    immortal: set[str] = field(default_factory=set)
    live: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("jobs", "latents_bytes", "reserved_bytes"), 0))


def audit_jobs(connections: Connections, *, max_keys: int) -> JobAudit:
    """Walks over up to `max_keys` keys."""
    for _ in range(_TRIES):
        audit, is_clear = _audit(connections, max_keys=max_keys)
        if is_clear:
            return audit
    return dataclasses.replace(audit, recounted=None)


def _audit(connections: Connections, *, max_keys: int) -> tuple[JobAudit, bool]:
    walk = _Walk(connections)
    with pipelined(connections, transaction=True) as pipe:
        pipe.time()
        pipe.hgetall(keys.TOTALS)
        now, totals = pipe.execute()
    found, count, cursor = _Found(at_ms=time_ms(now)), 0, 0
    while True:
        with broker_errors(connections.url):
            cursor, part = connections.commands.scan(cursor, count=_SCAN_COUNT)
        count += len(part)
        # Other programs' keys may be any bytes.
        walk.look(found, [key if isinstance(key, str) else key.decode(errors="replace") for key in part])
        if cursor == 0 or count >= max_keys:
            break
    audit = JobAudit(
        keys_seen=count,
        complete=cursor == 0,
        unlisted=tuple(sorted(walk.unlisted(found.queued))),
        unleased=tuple(sorted(walk.unleased(found.processing))),
        immortal=tuple(sorted(walk.immortal(sorted(found.immortal)[:_SUSPECTS]))),
        totals=totals_of(totals),
        recounted=Totals(**found.live) if cursor == 0 else None,
    )
    return audit, found.is_clear


class _Walk:
    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def look(self, found: _Found, names: Sequence[str]) -> None:
        """Takes these keys into account."""
        named = dict.fromkeys(name.removeprefix(_JOB) for name in names if name.startswith(_JOB))
        job_ids = [job_id for job_id in named if job_id not in found.seen]  # SCAN may name a key twice
        found.seen.update(job_ids)
        for job_id, values in zip(job_ids, self._ask("hmget", [(keys.job(i), *_FIELDS) for i in job_ids]), strict=True):
            record = {name: value for name, value in zip(_FIELDS, values, strict=True) if value is not None}
            if "state" in record:
                _count(found, job_id, record)
        found.immortal |= self.immortal(names)

    def immortal(self, names: Sequence[str]) -> set[str]:
        """Those of our keys that neither expire nor belong to a job that has not ended."""
        judged = [name for name in names if name.startswith(_JUDGED)]
        ttls = self._ask("pttl", [(name,) for name in judged])
        endless = [name for name, ttl in zip(judged, ttls, strict=True) if ttl == -1]
        blobs = [name for name in endless if name.startswith((_BLOB, _OWNERS))]
        owners = self._ask("zrange", [(keys.owners(_suffix(name)), 0, -1) for name in blobs], withscores=True)
        owned_by = {
            name: [text(job_id) for job_id, until in ids if float(until) == float("inf")]
            for name, ids in zip(blobs, owners, strict=True)
        }
        for name in endless:
            if name.startswith((_JOB, _RQ_JOB, _ATTEMPTS)):
                owned_by[name] = [_suffix(name)]
        live = self._live({job_id for ids in owned_by.values() for job_id in ids})
        suspects = {name for name in endless if not live.intersection(owned_by.get(name, ()))}
        return suspects - self._foreign([name for name in suspects if name.startswith(_RQ_JOB)])

    def unlisted(self, queued: Mapping[str, str]) -> list[str]:
        """Those of these jobs that wait on no list."""
        queues = sorted(set(queued.values()))
        if sum(self._ask("llen", [(keys.rq_queue(queue),) for queue in queues])) > _QUEUED_LIMIT:
            return []
        listed = {
            text(job_id)
            for ids in self._ask("lrange", [(keys.rq_queue(queue), 0, -1) for queue in queues])
            for job_id in ids
        }
        suspects = [job_id for job_id in queued if job_id not in listed][:_SUSPECTS]
        with pipelined(self._connections, transaction=True) as pipe:
            for job_id in suspects:
                pipe.hget(keys.job(job_id), "state")
                pipe.lpos(keys.rq_queue(queued[job_id]), job_id)
                pipe.zscore(keys.PARKED, job_id)
            flat = pipe.execute()
        return [
            job_id
            for job_id, state, place, parked in zip(suspects, flat[::3], flat[1::3], flat[2::3], strict=True)
            if state == b"queued" and place is None and parked is None
        ]

    def unleased(self, processing: Iterable[str]) -> list[str]:
        """Those of these jobs that run without a lease, so that nobody would notice if their worker died."""
        suspects = sorted(processing)
        with pipelined(self._connections, transaction=True) as pipe:
            for job_id in suspects:
                pipe.hget(keys.job(job_id), "state")
                pipe.zscore(keys.LEASES, job_id)
            flat = pipe.execute()
        return [
            job_id
            for job_id, state, lease in zip(suspects, flat[::2], flat[1::2], strict=True)
            if state == b"processing" and lease is None
        ]

    def _foreign(self, rq_jobs: Sequence[str]) -> set[str]:
        """RQ's hashes that belong to another program, or to a job that still waits for us to refuse it."""
        records = self._ask("exists", [(keys.job(_suffix(name)),) for name in rq_jobs])
        facts = self._ask("hmget", [(name, "origin", "status") for name in rq_jobs])
        return {
            name
            for name, record, (origin, status) in zip(rq_jobs, records, facts, strict=True)
            if not record and not (origin and text(origin).startswith(keys.QUEUE_PREFIX) and status in _RQ_ENDED)
        }

    def _live(self, job_ids: Iterable[str]) -> set[str]:
        ids = list(job_ids)
        states = self._ask("hget", [(keys.job(job_id), "state") for job_id in ids])
        return {job_id for job_id, state in zip(ids, states, strict=True) if state in _LIVE}

    def _ask(self, command: str, arguments: Sequence[tuple[Any, ...]], **options: Any) -> list[Any]:
        """The answers to one command, sent with each of these arguments in one round trip."""
        if not arguments:
            return []
        with pipelined(self._connections) as pipe:
            for item in arguments:
                getattr(pipe, command)(*item, **options)
            return list(pipe.execute())


def _count(found: _Found, job_id: str, record: Mapping[str, bytes]) -> None:
    def number(name: str) -> int:
        return int(record.get(name) or 0)

    live, at_ms = record["state"] in _LIVE, found.at_ms
    if at_ms in (number("submitted_ms"), number("ended_ms")):
        found.is_clear = False  # before or after? The clock's milliseconds cannot tell
    if number("submitted_ms") < at_ms and (live or number("ended_ms") >= at_ms):
        found.live["jobs"] += 1
        found.live["latents_bytes"] += number("latents_bytes")
        found.live["reserved_bytes"] += number("reserved_bytes")
    if record["state"] == b"queued" and at_ms - number("queued_ms") > _SETTLE_MS:
        found.queued[job_id] = text(record["rq_queue"])
    if record["state"] == b"processing" and at_ms - number("started_ms") > _SETTLE_MS:
        found.processing.add(job_id)


def _suffix(name: str) -> str:
    prefix = next(prefix for prefix in _JUDGED if name.startswith(prefix))
    return name.removeprefix(prefix)
