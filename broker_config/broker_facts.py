"""What a broker says of itself, measured once: version, memory, persistence, latency, clock."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import ResponseError

from broker_config.connection import Connections, broker_errors
from broker_config.supported_servers import fault_of_version, server_version

#: Round trips whose median is the latency.
_PINGS: Final = 7
#: A script that may write and does not: the broker refuses it where it would refuse a submit's first write, so it
#: finds a full memory, a full disk, a read-only replica and missing rights, and leaves nothing behind.
_MAY_I_WRITE: Final = "#!lua\nreturn 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokerFacts:
    """One look at a broker."""

    #: "Valkey 9.1.2".
    version: str
    #: Why that is too old; None: it is not.
    version_fault: str | None
    #: 0: no limit.
    max_memory_bytes: int
    used_memory_bytes: int
    #: What happens at the limit.
    eviction: str
    aof: bool
    #: always, everysec, no; None: the broker does not let us ask.
    appendfsync: str | None
    #: Whether the last append, rewrite and snapshot went well.
    append_ok: bool
    rewrite_ok: bool
    snapshot_ok: bool
    #: Why it would refuse a write now; None: it would not.
    write_refusal: str | None
    #: Median round trip.
    latency_s: float
    #: How far this host's clock is ahead of the broker's; negative: behind.
    clock_ahead_s: float


def write_refusal(connections: Connections) -> str | None:
    """Why the broker would refuse a submit's first write now; None: it would not.

    Raises:
        BrokerError: it does not answer.
    """
    with broker_errors(connections.url):
        try:
            connections.commands.eval(_MAY_I_WRITE, 0)
        except ResponseError as error:
            return str(error)
    return None


def read_broker_facts(connections: Connections) -> BrokerFacts:
    """Looks at the broker.

    Raises:
        BrokerError: it does not answer, or hides INFO.
    """
    client = connections.commands
    with broker_errors(connections.url):
        round_trips = []
        for _ in range(_PINGS):
            start = time.perf_counter()
            client.ping()
            round_trips.append(time.perf_counter() - start)
        before = time.time()
        seconds, micros = client.time()
        ahead_s = (before + time.time()) / 2 - (int(seconds) + int(micros) / 1e6)
        info: dict[str, Any] = client.info()
        try:
            appendfsync = client.config_get("appendfsync").get("appendfsync")
        except ResponseError:  # managed brokers forbid CONFIG
            appendfsync = None
    refusal = write_refusal(connections)
    server, version = server_version(info)
    return BrokerFacts(
        version=f"{server} {version}",
        version_fault=fault_of_version(server, version),
        max_memory_bytes=int(info.get("maxmemory", 0)),
        used_memory_bytes=int(info.get("used_memory", 0)),
        eviction=str(info.get("maxmemory_policy", "noeviction")),
        aof=bool(int(info.get("aof_enabled", 0))),
        appendfsync=None if appendfsync is None else str(appendfsync),
        append_ok=info.get("aof_last_write_status", "ok") == "ok",
        rewrite_ok=info.get("aof_last_bgrewrite_status", "ok") == "ok",
        snapshot_ok=info.get("rdb_last_bgsave_status", "ok") == "ok",
        write_refusal=refusal,
        latency_s=statistics.median(round_trips),
        clock_ahead_s=ahead_s,
    )
