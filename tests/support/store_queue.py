"""A test's broker, with what a test does to the queue in it: for tests of `JobStore`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from broker_config import keys
from broker_config.blob_store import RedisBlobStore
from broker_config.claims import Claim, Outcome
from broker_config.connection import Connections
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.messages import DecodeRequest, Output
from broker_config.settings import Settings
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

#: A lease long enough that none ends by itself, and one that ends while a test waits for it.
LONG_S: Final = 60.0
SHORT_S: Final = 0.1
#: No pause between two looks at the leases counts as an outage.
NO_OUTAGE_S: Final = 3600.0
PX: Final = 64 * 64

names = itertools.count()


@dataclass
class Queue:
    """The broker of a test, with what a test does to it."""

    connections: Connections
    settings: Settings
    #: Typed loosely: redis-py says of every answer that it might be text.
    admin: Any

    def store(self, **overrides: Any) -> JobStore:
        """The state machine under other settings."""
        return JobStore(self.connections, self.settings.model_copy(update=overrides))

    def worker(self, name: str = "worker-a", *vaes: str, **overrides: Any) -> StoreWorker:
        """A worker of these VAEs (sd), under other settings."""
        return StoreWorker(self.store(**overrides), name=name, vaes=vaes or ("sd",))

    def request(self, job_id: str = "", *, latents: bytes = b"latents", **fields: Any) -> DecodeRequest:
        """A request whose latents are stored provisionally."""
        job_id = job_id or f"job-{next(names)}"
        blobs = RedisBlobStore(self.connections, provisional_s=900.0)
        wanted: dict[str, Any] = {
            "job_id": job_id,
            "vae": "sd",
            "layout": "unpacked",
            "latents": blobs.put(f"{job_id}.in", latents),
            "shape": (1, 4, 8, 8),
            "dtype": "float32",
            "height": 64,
            "width": 64,
            "batch": 1,
            "num_frames": 1,
            "fps": 8.0,
            "output": Output.PNG,
        }
        return DecodeRequest(**wanted | fields)

    def submit(self, job_id: str = "", *, store: JobStore | None = None, **fields: Any) -> str:
        """Submits a job; returns its id."""
        request = self.request(job_id, **fields)
        assert (store or self.store()).submit(request)
        return request.job_id

    def submit_many(self, count: int, **fields: Any) -> list[str]:
        """Submits jobs one after the other; returns their ids in order."""
        return [self.submit(**fields) for _ in range(count)]

    def waiting(self, vae: str = "sd", priority: str = "normal") -> list[str]:
        """Ids in a queue, next first."""
        return [item.decode() for item in self.admin.lrange(keys.rq_queue(keys.queue_name(vae, priority)), 0, -1)]

    def state(self, job_id: str) -> JobStatus:
        """Where the job is."""
        return self.store().snapshot(job_id).status

    def totals(self) -> dict[str, int]:
        """What admission counts."""
        return {name.decode(): int(value) for name, value in self.admin.hgetall(keys.TOTALS).items()}

    def reap(self, store: JobStore | None = None) -> dict[str, str]:
        """Waits until leases end; returns what became of their jobs."""
        looking = store or self.store(lease_s=SHORT_S)
        found = wait_until(lambda: looking.reap("janitor", quiet_s=NO_OUTAGE_S).jobs, what="a lease to end")
        return dict(found)

    def wait_ms(self, milliseconds: float) -> None:
        """Until the broker's clock has gone on by this much."""
        until = self.store().now_ms() + milliseconds
        wait_until(lambda: self.store().now_ms() > until, what="the broker's clock")

    @contextmanager
    def max_memory(self, size_bytes: int) -> Iterator[None]:
        """Inside the block the broker may use this much memory."""
        before = self.admin.config_get("maxmemory")["maxmemory"]
        self.admin.config_set("maxmemory", size_bytes)
        try:
            yield
        finally:
            self.admin.config_set("maxmemory", before)


def ids(claims: list[Claim]) -> list[str]:
    """Which jobs were claimed, in order."""
    return [claim.job_id for claim in claims]


def end(queue: Queue, job: str) -> None:
    worker = queue.worker(f"worker-{next(names)}")
    claim = worker.claim_one()
    assert claim.job_id == job
    assert worker.succeed(claim) is Outcome.COMPLETED
