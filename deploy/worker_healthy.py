"""Container health check: ends with 0 if the broker hears the worker of this container, else 1 with the reason.

A worker says every few seconds that it lives and what it serves; one that hangs, is still loading, or is cut off
does not. Runs without torch, in well under a second. The worker is known by its name: the one configured, or one that
begins with this host's.
"""

from __future__ import annotations

import sys

from broker_config import keys
from broker_config.connection import broker_errors, connect
from broker_config.errors import LatentqError
from broker_config.job_store import JobStore
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from worker.settings import load_worker_settings


def live_workers() -> set[str]:
    """Names of the workers that serve a VAE of the catalogue now."""
    settings = load_settings()
    connections = connect(settings, name="latentq-health", retries=0)
    now_ms = JobStore(connections, settings).now_ms()
    names: set[str] = set()
    with broker_errors(connections.url), connections.commands.pipeline(transaction=False) as pipe:
        for vae in VaeCatalog.load(settings.catalog):
            pipe.zrangebyscore(keys.serving(vae), now_ms, "+inf")
        for members in pipe.execute():
            names.update(member.decode() for member in members)
    connections.close()
    return names


def main() -> int:
    """Returns the exit status."""
    try:
        own, live = load_worker_settings(), live_workers()
    except LatentqError as error:
        print(f"{error.message} [{error.code}]", file=sys.stderr)
        return 1
    # A name that is not configured is host-pid-random, here with the pid of this process.
    configured = "name" in own.model_fields_set
    host = own.name.rsplit("-", 2)[0] + "-"
    if own.name in live if configured else any(name.startswith(host) for name in live):
        return 0
    print(f"the broker hears no worker {own.name if configured else host + '…'}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
