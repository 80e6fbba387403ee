"""Checks of the jobs: does anything stand still that nobody will move?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from broker_config.queue_report import QueueState
from producer.doctor.finding import Check, Finding, Observations, ok, problem, warning
from producer.quantities import counted, duration

#: A janitor looks every second; worker/janitor.py counts a pause of ten as an outage.
_QUIET_S: Final = 10.0
#: Names in a finding; the count says how many there are.
_NAMED: Final = 3


def janitor(seen: Observations) -> Finding:
    """Without a janitor, jobs of dead workers stay with them and nothing ever expires."""
    leases = seen.leases
    if leases.janitor is None:
        return problem(
            "janitor",
            "none leads: jobs of workers that die do not come back, and retention does not end",
            fix="run `latentq janitor` (several may run, one leads); `latentq up` brings one along",
        )
    if leases.reaped_s is None or leases.reaped_s > _QUIET_S:
        since = "" if leases.reaped_s is None else f" for {duration(leases.reaped_s)}"
        return problem(
            "janitor",
            f"{leases.janitor} leads, but has not looked at the leases{since}",
            fix="look at its log; end it, and another takes over within 3 s",
        )
    return ok("janitor", f"{leases.janitor} leads")


def leases(seen: Observations) -> Finding:
    """A job whose lease ended has no worker any more; the janitor queues it again within a second."""
    state = seen.leases
    if state.overdue == 0:
        return ok("leases", f"{state.held} held, none overdue")
    text = f"{counted(state.overdue, 'job')} without a live worker: {_some(state.overdue_ids, state.overdue)}"
    if state.grace_s > 0:
        return warning(
            "leases",
            f"{text}; leases do not count for {duration(state.grace_s)} more, after an outage",
            fix="wait: workers that were cut off take their jobs up again, the others' go back",
        )
    return problem("leases", text, fix="start a janitor (`latentq janitor`), or look at the log of the one that leads")


def suspended(seen: Observations) -> Finding:
    """RQ's own switch stops our workers, too."""
    if seen.suspended:
        return warning("suspended", "someone suspended every worker with `rq suspend`", fix="`rq resume`")
    return ok("suspended", "no")


def unserved(seen: Observations) -> Finding:
    """Jobs of a VAE that no live worker serves wait for ever."""
    waiting = _waiting(seen, lambda queue: queue.workers == 0 and not queue.paused)
    if waiting:
        return problem(
            "unserved VAEs",
            f"no live worker serves {_per_vae(waiting)}",
            fix=f"start one: `latentq worker {' '.join(f'--vae {vae}' for vae in waiting)}`",
        )
    return ok("unserved VAEs", "none has jobs waiting")


def paused(seen: Observations) -> Finding:
    """Someone paused a VAE and may have forgotten."""
    waiting = _waiting(seen, lambda queue: queue.paused)
    if waiting:
        return warning(
            "paused VAEs",
            f"paused: {_per_vae(waiting)}",
            fix=" and ".join(f"`latentq resume {vae}`" for vae in waiting),
        )
    return ok("paused VAEs", "none has jobs waiting")


def waits(seen: Observations) -> Finding:
    """Workers are there, but do not keep up, or hang."""
    served = [queue for queue in seen.queues if queue.workers and not queue.paused and queue.oldest_s is not None]
    oldest = max(served, key=lambda queue: queue.oldest_s or 0.0, default=None)
    if oldest is None or oldest.oldest_s is None:
        return ok("waits", "no job waits")
    text = f"the oldest job waits for {duration(oldest.oldest_s)} ({oldest.vae}.{oldest.priority})"
    if oldest.oldest_s > seen.long_wait_s:
        return warning(
            "waits",
            text,
            fix=f"`latentq workers`: if they are busy, start more for {oldest.vae}; if not, look at their logs",
        )
    return ok("waits", text)


def parked(seen: Observations) -> Finding:
    """Jobs from newer producers wait for newer workers; they are never failed for it."""
    count = sum(queue.parked for queue in seen.queues)
    if count:
        return warning(
            "parked jobs",
            f"{counted(count, 'job')} of a newer message version, which no worker here can read",
            fix="upgrade a worker of that VAE: at its start it takes them up",
        )
    return ok("parked jobs", "none")


def lost(seen: Observations) -> Finding:
    """Jobs that someone's tool took off a list; the janitor's walk brings them back."""
    ids = (*seen.audit.unlisted, *seen.audit.unleased)
    if not ids:
        return ok("lost jobs", f"none among {_scanned(seen)}")
    parts = []
    if seen.audit.unlisted:
        parts.append(f"{counted(len(seen.audit.unlisted), 'job')} queued, but on no list")
    if seen.audit.unleased:
        parts.append(f"{counted(len(seen.audit.unleased), 'job')} processing, but without lease")
    text = f"{' and '.join(parts)}: {_some(ids, len(ids))}"
    if seen.leases.janitor is None:
        return problem("lost jobs", text, fix="start a janitor (`latentq janitor`): its walk queues them again")
    return warning(
        "lost jobs", text, fix="wait for the janitor's walk (half a minute for 100,000 jobs), then look again"
    )


def totals(seen: Observations) -> Finding:
    """What admission counts must be what is there, or the queue refuses too early or too late."""
    told, truth = seen.audit.totals, seen.audit.recounted
    if truth is None:
        why = "too many keys" if not seen.audit.complete else "jobs come and go too fast"
        return ok("totals", f"not compared: {why} (looked at {seen.audit.keys_seen}; `--scan` raises the limit)")
    if told == truth:
        return ok("totals", f"{counted(truth.jobs, 'unfinished job')}, as counted")
    off = [
        f"{name} {getattr(told, name)} instead of {getattr(truth, name)}"
        for name in (item.name for item in dataclasses.fields(told))
        if getattr(told, name) != getattr(truth, name)
    ]
    values = " ".join(f"{item.name} {getattr(truth, item.name)}" for item in dataclasses.fields(truth))
    return warning(
        "totals",
        f"admission counts {', '.join(off)}",
        fix="wait a minute for the janitor, which counts up to 10,000 unfinished jobs anew; with more, while nothing "
        f"is submitted or decoded: `redis-cli HSET latentq:totals {values}`",
    )


def stray_keys(seen: Observations) -> Finding:
    """Every key expires or has an owner; one that does neither stays for good."""
    names = seen.audit.immortal
    if names:
        return warning(
            "keys",
            f"{counted(len(names), 'key')} that nothing will delete: {_some(names, len(names))}",
            fix="look at what made them (`redis-cli --scan`, `OBJECT IDLETIME`), then `UNLINK` them; please report it",
        )
    return ok("keys", f"each of {_scanned(seen)} expires or has an owner")


def _waiting(seen: Observations, wanted: Callable[[QueueState], bool]) -> dict[str, int]:
    """VAE → jobs that wait in its queues that are `wanted`."""
    waiting: dict[str, int] = {}
    for queue in seen.queues:
        if queue.queued and wanted(queue):
            waiting[queue.vae] = waiting.get(queue.vae, 0) + queue.queued
    return waiting


def _per_vae(waiting: Mapping[str, int]) -> str:
    return ", ".join(f"{vae} ({counted(count, 'job')} waiting)" for vae, count in waiting.items())


def _some(names: Sequence[str], count: int) -> str:
    more = f" and {count - _NAMED} more" if count > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _scanned(seen: Observations) -> str:
    return f"{'' if seen.audit.complete else 'the first '}{counted(seen.audit.keys_seen, 'key')}"


JOB_CHECKS: Final[tuple[Check, ...]] = (
    janitor, leases, suspended, unserved, paused, waits, parked, lost, totals, stray_keys,
)  # fmt: skip
