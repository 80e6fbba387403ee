"""A broker of its own with one worker process, for modules whose tests share them (a worker takes seconds to start)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

from broker_config.connection import connect_url
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient, JobHandle, Settings
from producer.job_handle import finished_result
from tests.support.keys_left import assert_no_stray_keys
from tests.support.processes import WorkerProcesses

#: A tiny job takes milliseconds; this is for a machine that does much else.
PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """A client, and the broker and worker behind it."""

    client: DecodeClient
    settings: Settings
    workers: WorkerProcesses
    #: Sees what the client does not ask for.
    admin: redis.Redis

    def decode(self, latents: object, **options: object) -> JobHandle:
        """The job of these latents, once it succeeded."""
        job = self.client.submit(latents, **options)  # type: ignore[arg-type]
        return self.finished(job)

    def finished(self, job: JobHandle) -> JobHandle:
        """`job`, once it succeeded."""
        finished_result(job.wait(timeout=PATIENCE_S))
        return job


@contextlib.contextmanager
def serving(folder: Path, *, catalog: Path, vaes: tuple[str, ...]) -> Iterator[Serving]:
    """A broker in `folder` and a worker for `vaes` (none: no worker); afterwards no stray key may be left."""
    with EmbeddedBroker(folder, max_memory_bytes=256 * 1024 * 1024) as broker:
        # Long leases: nobody reaps here, and a machine under load must not change what these tests see.
        settings = load_settings(redis_url=broker.url, catalog=catalog, lease_s=30.0, lease_renew_s=1.0, _env_file=None)
        connections = connect_url(broker.url, name="latentq-test")
        workers = WorkerProcesses(settings)
        with redis.Redis.from_url(broker.url) as admin:
            try:
                if vaes:
                    workers.start(*vaes)
                client = DecodeClient(connections, settings=settings, catalog=VaeCatalog.load(catalog))
                yield Serving(client=client, settings=settings, workers=workers, admin=admin)
            finally:
                workers.stop_all()
                connections.close()
            assert_no_stray_keys(admin)
