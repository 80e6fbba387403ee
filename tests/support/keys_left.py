"""Which keys may stay in the broker: those with a TTL, and those the schema names an owner for."""

from __future__ import annotations

import re

import redis

#: Keys without TTL that broker_config/keys.py documents, and RQ's own indexes.
_OWNED = re.compile(
    rb"latentq:(leases|retention|submitted|deadlines|parked|totals|paused|stores|keys|tally:.+|external:.+|doomed:.+"
    rb"|outbox|receivers|due:.+|sending:.+|stopped|dead-letters|webhook-counts)"
    rb"|rq:(queues|workers|workers:.+|queue:.+|wip:.+|finished:.+|failed:.+|canceled:.+|clean_registries:.+)"
)


def stray_keys(admin: redis.Redis) -> list[str]:
    """Keys that have neither a TTL nor a documented owner."""
    live = {b"queued", b"processing"}
    stray = []
    for key in admin.scan_iter(count=1000):
        if admin.ttl(key) != -1 or _OWNED.fullmatch(key):
            continue
        prefix, _, name = key.rpartition(b":")
        if (
            prefix in (b"latentq:job", b"rq:job", b"latentq:attempts", b"latentq:webhook-secret:job")
            and admin.hget(b"latentq:job:" + name, "state") in live
        ):
            continue  # a live job owns them
        if prefix in (b"latentq:blob", b"latentq:owners") and admin.zcount(b"latentq:owners:" + name, "inf", "inf"):
            continue
        if prefix in (b"rq:executions",) and admin.hget(b"latentq:job:" + name, "state") in live:
            continue
        stray.append(key.decode())
    return sorted(stray)


def assert_no_stray_keys(admin: redis.Redis) -> None:
    """Fails with the list of keys nobody will ever delete."""
    assert stray_keys(admin) == []
