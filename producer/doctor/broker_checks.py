"""Checks of the broker itself: can it keep what was accepted, and does it take more?"""

from __future__ import annotations

from typing import Final

from producer.doctor.finding import Check, Finding, Observations, ok, problem, warning
from producer.quantities import byte_size, duration

#: Above this, a claim and its answer cost more than many a decode. The same machine has 0.1 ms, a LAN 0.5 ms.
_SLOW_S: Final = 0.05
#: Above this, times in logs and `rq info` mislead. No job is decided by a host's clock.
_SKEW_S: Final = 2.0
#: From here on the queue is about to refuse submits.
NEARLY_FULL: Final = 0.8


def version(seen: Observations) -> Finding:
    """Scripts that may run when memory is full came with Redis 7.0."""
    if seen.facts.version_fault:
        return problem(
            "version", f"the broker {seen.facts.version_fault}", fix="upgrade to Redis 7.0 or Valkey 7.2, or newer"
        )
    return ok("version", seen.facts.version)


def latency(seen: Observations) -> Finding:
    """Every stage of every job waits for round trips."""
    text = f"{seen.facts.latency_s * 1000:.1f} ms a round trip"
    if seen.facts.latency_s > _SLOW_S:
        return warning(
            "latency",
            text,
            fix="run broker and workers in one network; `redis-cli --intrinsic-latency` and `slowlog get` on the "
            "broker's host tell whether it is the broker",
        )
    return ok("latency", text)


def clock(seen: Observations) -> Finding:
    """Leases and retention go by the broker's clock; a host that is off misleads whoever compares logs."""
    ahead_s = seen.facts.clock_ahead_s
    if abs(ahead_s) > _SKEW_S:
        side = "ahead of" if ahead_s > 0 else "behind"
        return warning(
            "clock",
            f"this host's clock is {duration(abs(ahead_s))} {side} the broker's; jobs go by the broker's, but log "
            "times and `rq info` mislead",
            fix="synchronise both hosts (chrony, systemd-timesyncd)",
        )
    return ok("clock", f"within {max(0.1, abs(ahead_s)):.1f} s of the broker's")


def memory_limit(seen: Observations) -> Finding:
    """Admission closes at a share of maxmemory; without one, the kernel's OOM killer is the limit."""
    if seen.facts.max_memory_bytes == 0:
        return warning(
            "memory limit",
            "maxmemory is not set: a backlog grows until the kernel kills the broker",
            fix="`CONFIG SET maxmemory 4gb` and the same in the configuration file; about half of the host's memory, "
            "because rewriting the AOF can take as much again",
        )
    used, limit = byte_size(seen.facts.used_memory_bytes), byte_size(seen.facts.max_memory_bytes)
    return ok("memory limit", f"{used} of {limit} used")


def eviction(seen: Observations) -> Finding:
    """Any other policy deletes accepted jobs when memory is full."""
    policy = seen.facts.eviction
    if policy == "noeviction":
        return ok("eviction", "noeviction")
    fix = "`CONFIG SET maxmemory-policy noeviction` and the same in the configuration file"
    if seen.facts.max_memory_bytes == 0:
        return warning("eviction", f"maxmemory-policy is {policy}; harmless while maxmemory is not set", fix=fix)
    return problem("eviction", f"maxmemory-policy is {policy}: a full broker deletes accepted jobs", fix=fix)


def aof(seen: Observations) -> Finding:
    """Without the append-only file a restart loses every job since the last snapshot."""
    if not seen.facts.aof:
        return problem(
            "aof",
            "appendonly is off: a restart of the broker loses jobs",
            fix="`CONFIG SET appendonly yes` and the same in the configuration file",
        )
    return ok("aof", "on")


def fsync(seen: Observations) -> Finding:
    """Only `always` answers after the write is in the file. With `everysec` one that comes during an fsync waits
    in the server's memory, for up to 2 s, and is answered all the same (aof.c `flushAppendOnlyFile`)."""
    policy = seen.facts.appendfsync
    if not seen.facts.aof:
        return ok("fsync", "does not matter while the append-only file is off")
    if policy is None:
        return ok("fsync", "unknown: this broker forbids CONFIG")
    if policy == "no" and seen.settings.redis_url is None:
        return ok("fsync", "each second, by the process that runs the broker: a loss of power loses the last one")
    if policy == "no":
        return warning(
            "fsync",
            "appendfsync is no: a loss of power loses what the system had not written yet, up to half a minute",
            fix="`CONFIG SET appendfsync always`",
        )
    if policy == "everysec":
        return warning(
            "fsync",
            "appendfsync is everysec: a broker that is killed may lose what it accepted during its last fsync, up to "
            "two seconds; a loss of power the last second",
            fix="`CONFIG SET appendfsync always`",
        )
    return ok("fsync", f"{policy}: neither a killed broker nor a loss of power loses an accepted job")


def disk(seen: Observations) -> Finding:
    """The broker says whether its last writes to disk went well. One with `appendfsync always` cannot say so of the
    append-only file: it ends at the first write that fails (aof.c `flushAppendOnlyFile`), and does not answer."""
    if not seen.facts.append_ok:
        return problem(
            "disk",
            "the last write to the append-only file failed: the broker refuses writes",
            fix="free space on the broker's disk (`redis-cli info persistence`, its log); it goes on by itself",
        )
    failed = [
        name
        for name, good in (("AOF rewrite", seen.facts.rewrite_ok), ("snapshot", seen.facts.snapshot_ok))
        if not good
    ]
    if failed:
        return warning(
            "disk",
            f"the last {' and '.join(failed)} failed: files on the broker's disk grow",
            fix="look at the broker's log; free disk space, or memory for the fork (`vm.overcommit_memory = 1`)",
        )
    return ok("disk", "the last writes went well")


_REFUSALS: Final = (
    ("misconf", "free space on the broker's disk; its log says which write failed"),
    ("maxmemory", "let workers catch up, `latentq purge` what is not needed, or raise maxmemory"),
    ("read only replica", "point LATENTQ_REDIS_URL at the primary"),
    ("replicas", "bring the replicas back, or lower min-replicas-to-write"),
    ("permission", "give this user the rights that docs/operating.md lists"),
)


def writes(seen: Observations) -> Finding:
    """Whether the broker would take a submit's first write."""
    refusal = seen.facts.write_refusal
    if refusal is None:
        return ok("writes", "accepted")
    fix = next((fix for word, fix in _REFUSALS if word in refusal.lower()), "look at the broker's log")
    return problem("writes", f"the broker refuses writes: {refusal}", fix=fix)


#: What is refused at a limit, and what to do about it.
_ALL: Final = (
    "submits",
    "start more workers, `ack` results that are safe elsewhere, shorten LATENTQ_RETENTION_S, or LATENTQ_TOMBSTONE_S "
    "where jobs are many, or raise the limit",
)
_WITH_WEBHOOK: Final = (
    "submits with a webhook",
    "`latentq webhooks list --pending` says what waits: start more couriers or workers, or raise the limit",
)
_TO_RECEIVER: Final = (
    "submits with a webhook there",
    "`latentq webhooks list --pending` says what waits and why: bring that receiver back, or start more couriers",
)


def admission(seen: Observations) -> Finding:
    """How near the limits are at which submits are refused."""
    settings, totals, facts = seen.settings, seen.totals, seen.facts
    # The same sums as scripts/prelude.lua, `refusal`.
    fills = [
        (totals.jobs / settings.max_pending_jobs, "of LATENTQ_MAX_PENDING_JOBS", _ALL),
        (totals.latents_bytes / settings.max_pending_bytes, "of LATENTQ_MAX_PENDING_BYTES", _ALL),
        (
            (seen.webhooks.pending + seen.webhooks.reserved) / settings.webhook_max_pending,
            "of LATENTQ_WEBHOOK_MAX_PENDING",
            _WITH_WEBHOOK,
        ),
    ]
    for receiver, waiting in seen.crowded.items():
        fills.append(
            (
                waiting / (settings.webhook_max_pending / 4),
                f"of the quarter of LATENTQ_WEBHOOK_MAX_PENDING that may wait for {receiver}",
                _TO_RECEIVER,
            )
        )
    if facts.max_memory_bytes:
        bytes_in_all = facts.used_memory_bytes + totals.reserved_bytes
        fills.append(
            (
                bytes_in_all / (facts.max_memory_bytes * settings.memory_watermark),
                f"of what submits may fill ({settings.memory_watermark:.0%} of maxmemory), expected results included",
                _ALL,
            )
        )
    share, what, (refused, fix) = max(fills)
    text = f"{share:.0%} {what}"
    if share < NEARLY_FULL:
        return ok("admission", text)
    if share < 1:
        return warning("admission", text, fix=fix)
    return problem("admission", f"{text}: {refused} are refused", fix=fix)


def blob_store(seen: Observations) -> Finding:
    """A folder of this host alone, an unmounted disk, or another broker's bucket would hide latents from workers."""
    state = seen.store
    known = f"{state.registered[1]} (id {state.registered[0]})" if state.registered else ""
    one_place = "set LATENTQ_BLOB_STORE to the same place for every process; docs/blob-stores.md says how to move"
    if state.fault:
        return problem("blob store", state.fault, fix="look at the folder or service, its rights and LATENTQ_S3_…")
    if state.url is None:
        if not known:
            return ok("blob store", "all blobs lie in the broker")
        return problem(
            "blob store", f"the broker's large blobs lie in {known}, but none is set on this host", fix=one_place
        )
    here = f"has id {state.found_id}" if state.found_id else "is not a store yet"
    if state.registered is None and state.found_id is None:
        return ok("blob store", f"{state.url} {here}; its first use makes it one")
    if state.registered is None or state.registered[0] != state.found_id:
        theirs = f"the broker's is {known}" if known else "the broker knows none"
        return problem("blob store", f"{state.url} {here}; {theirs}", fix=f"mount it on this host, or {one_place}")
    return ok("blob store", f"{state.url} is the broker's")


BROKER_CHECKS: Final[tuple[Check, ...]] = (
    version, latency, clock, memory_limit, eviction, aof, fsync, disk, writes, admission, blob_store,
)  # fmt: skip
