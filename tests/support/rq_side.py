"""A test's broker, used by us and by stock RQ: for tests of the contract between the two."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.registry import (
    BaseRegistry,
    CanceledJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq.serializers import JSONSerializer

from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.settings import Settings
from producer import DecodeClient
from tests.support.store_worker import StoreWorker
from worker.rq_adapter import RqPresence

QUEUE: Final = "latentq.sd.normal"
LATENTS: Final = np.zeros((1, 4, 8, 8), dtype=np.float32)
RETENTION_S: Final = 3600
DAY_S: Final = 86_400


@dataclass
class Side:
    """The test's broker, seen through latentq and through RQ."""

    url: str
    settings: Settings
    #: Typed loosely: redis-py says of every answer that it might be text.
    admin: Any
    store: JobStore

    def submit(self, job_id: str) -> Job:
        """Submits through latentq; returns the job as RQ reads it."""
        client = DecodeClient(self.store.connections, settings=self.settings)
        client.submit(LATENTS, vae="sd", job_id=job_id, retention_s=RETENTION_S)
        return self.fetch(job_id)

    def enqueue(self, function: Callable[..., Any], job_id: str, **options: Any) -> Job:
        """Enqueues on our queue with RQ itself."""
        ours: dict[str, Any] = {
            "timeout": 60,
            "result_ttl": RETENTION_S,
            "failure_ttl": RETENTION_S,
            "description": "a job",
        }
        return self.queue.enqueue_call(function, args=[job_id], job_id=job_id, **ours | options)

    def fetch(self, job_id: str) -> Job:
        """The job as RQ reads it."""
        return Job.fetch(job_id, connection=self.admin, serializer=JSONSerializer)

    @property
    def queue(self) -> Queue:
        """The queue as RQ reads it."""
        return Queue(QUEUE, connection=self.admin, serializer=JSONSerializer)

    def registry(self, kind: type[BaseRegistry]) -> BaseRegistry:
        """One of the queue's registries as RQ reads it."""
        return kind(QUEUE, connection=self.admin, serializer=JSONSerializer)

    def listed(self) -> dict[str, list[str]]:
        """Which of the queue's registries hold which jobs, by RQ's reading; without those that are empty."""
        kinds = (StartedJobRegistry, FinishedJobRegistry, FailedJobRegistry, CanceledJobRegistry)
        found = {kind.__name__.removesuffix("JobRegistry"): self.registry(kind).get_job_ids() for kind in kinds}
        return {name: job_ids for name, job_ids in found.items() if job_ids}

    def state(self, job_id: str) -> JobStatus:
        """The job as latentq has it."""
        return self.store.snapshot(job_id).status

    def worker(self, name: str = "worker-a", **overrides: Any) -> StoreWorker:
        """A worker of ours, without device."""
        store = JobStore(self.store.connections, self.settings.model_copy(update=overrides))
        return StoreWorker(store, name=name)

    def stock_worker(self, name: str = "worker-a") -> SimpleWorker:
        """RQ's own worker."""
        return SimpleWorker([self.queue], name=name, connection=self.admin, serializer=JSONSerializer)

    @contextmanager
    def presence(self, **told: Callable[..., None]) -> Iterator[RqPresence]:
        """Our worker as RQ sees it, for the length of the block."""
        presence = RqPresence(
            name="worker-a",
            queues=[QUEUE],
            connection=self.store.connections.commands,
            ttl_s=30,
            on_stop_job=told.get("on_stop_job", lambda job_id: None),
            on_shutdown=told.get("on_shutdown", lambda: None),
        )
        presence.announce()
        try:
            yield presence
        finally:
            presence.leave()

    def rq_info(self) -> list[str]:
        """What `rq info --raw` prints."""
        command = [str(Path(sys.executable).with_name("rq")), "info", "--raw", "--url", self.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.splitlines()


Facts = set[str]


def facts_of(admin: Any) -> Facts:
    """What RQ's keys hold, a line for each fact, without what differs from run to run (ids of executions, times)."""
    executions = {key.decode().rpartition(":")[2] for key in admin.scan_iter("rq:execution:*")}

    def plain(text: bytes) -> str:
        name = text.decode()
        for execution in executions:
            name = name.replace(execution, "EXECUTION")
        return name

    facts: Facts = set()
    for key in admin.scan_iter("rq:*"):
        kind, name = admin.type(key).decode(), plain(key)
        facts.add(f"{name} is a {kind}{' that expires' if admin.ttl(key) >= 0 else ''}")
        match kind:
            case "hash":
                facts |= {f"{name} has {part.decode()}" for part in admin.hkeys(key)}
                if key.startswith(b"rq:job:"):
                    facts.add(f"{name} is {admin.hget(key, 'status').decode()}")
            case "list":
                facts |= {f"{name} holds {plain(item)}" for item in admin.lrange(key, 0, -1)}
            case "set":
                facts |= {f"{name} holds {plain(item)}" for item in admin.smembers(key)}
            case "zset":
                for member, score in admin.zrange(key, 0, -1, withscores=True):
                    facts.add(f"{name} holds {plain(member)} until {'inf' if score == float('inf') else 'a time'}")
            case "stream":
                for _, entry in admin.xrange(key):
                    facts.add(f"{name} holds a {Result.Type(int(entry[b'type'])).name}")
                    facts |= {f"{name} has {part.decode()}" for part in entry}
    return facts
