"""Whatever order things happen in: no job is lost, ends twice, or leaves anything behind.

A Hypothesis state machine over submit, replay, claim, complete, fail, cancel, dead worker, cut-off worker, redecode and
the end of retention, on a real broker. The model is a dozen lines: which state each job must be in, and which attempt
may still speak for it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker_config import keys
from broker_config.claims import Claim, Outcome
from broker_config.connection import connect_url
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import ResultExpired
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.settings import Settings, load_settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient
from tests.support.keys_left import stray_keys
from tests.support.store_worker import StoreWorker

_ids = itertools.count()
MAX_ERRORS, MAX_CRASHES = 2, 2


@dataclass
class Model:
    """What a job must look like."""

    state: JobStatus = JobStatus.QUEUED
    #: The attempt that may still speak for the job: the last claim, unless it was given up.
    speaker: Claim | None = None
    errors: int = 0
    crashes: int = 0
    on_device: bool = False
    cancel_asked: bool = False
    #: The last attempt was counted as a crash; taken back if its worker turns out to live.
    counted: bool = False

    def comes_back(self) -> None:
        """The attempt that was given up for dead speaks up again."""
        if self.state is JobStatus.QUEUED and self.counted:
            self.crashes -= 1
        self.counted = False


class Jobs(RuleBasedStateMachine):
    """Random histories of a handful of jobs."""

    server: EmbeddedBroker
    jobs = Bundle("jobs")
    claims = Bundle("claims")

    @initialize()
    def begin(self) -> None:
        self.admin = redis.Redis.from_url(self.server.url)
        self.admin.flushall()
        own: Settings = load_settings(
            redis_url=self.server.url,
            lease_s=60,
            lease_renew_s=1,
            max_errors=MAX_ERRORS,
            max_crashes=MAX_CRASHES,
            _env_file=None,
        )
        self.connections = connect_url(self.server.url, name="state-machine")
        self.store = JobStore(self.connections, own)
        self.client = DecodeClient(self.connections, settings=own, catalog=VaeCatalog.load())
        self.worker = StoreWorker(self.store)
        self.model: dict[str, Model] = {}
        self.blobs: dict[str, str] = {}
        self.store.reap("janitor", quiet_s=3600)  # the first look starts a grace period
        self.admin.hset(keys.REAPER, "grace_ms", 0)

    def teardown(self) -> None:
        if not hasattr(self, "admin"):
            return
        for job_id in self.model:
            self.store.retire(job_id)
        for job_id, model in self.model.items():
            live = model.state in (JobStatus.QUEUED, JobStatus.PROCESSING)
            assert self.store.snapshot(job_id).status is (model.state if live else JobStatus.EXPIRED)
        assert stray_keys(self.admin) == []
        self.connections.close()
        self.admin.close()

    def submit_as(self, job_id: str, seed: int) -> None:
        latents = np.full((1, 4, 8, 8), seed, dtype=np.float32)
        self.client.submit(latents, vae="sd", job_id=job_id, provenance=False)

    @rule(target=jobs)
    def submit(self) -> str:
        job_id = f"job-{next(_ids)}"
        self.submit_as(job_id, 1)
        self.model[job_id] = Model()
        return job_id

    @rule(job_id=jobs)
    def submit_again(self, job_id: str) -> None:
        """A replay, whenever it comes, changes nothing (the invariants check it)."""
        if self.store.snapshot(job_id).request is None or "redecoded" in job_id:
            return
        self.submit_as(job_id, 1)

    @rule(target=claims, mark=st.booleans())
    def claim(self, mark: bool) -> Claim | None:
        """The head of the queue, if there is one; sometimes it gets as far as the device."""
        found = self.worker.claim()
        waiting = [job_id for job_id, model in self.model.items() if model.state is JobStatus.QUEUED]
        assert bool(found) == bool(waiting)
        if not found:
            return None
        (claim,) = found
        model = self.model[claim.job_id]
        assert model.state is JobStatus.QUEUED
        model.state, model.speaker, model.on_device = JobStatus.PROCESSING, claim, mark
        model.counted = False
        if mark:
            assert self.worker.renew(claim, stage="device") == ["renewed"]
        return claim

    def speaks(self, claim: Claim) -> bool:
        """Whether this attempt may still say something about its job."""
        model = self.model[claim.job_id]
        return model.speaker == claim and model.state in (JobStatus.QUEUED, JobStatus.PROCESSING)

    @rule(claim=claims)
    def complete(self, claim: Claim | None) -> None:
        if claim is None:
            return
        model, speaks = self.model[claim.job_id], self.speaks(claim)
        outcome = self.worker.succeed(claim)
        if speaks:
            assert outcome is Outcome.COMPLETED
            model.comes_back()
            model.state = JobStatus.SUCCEEDED
        else:
            assert outcome in (Outcome.ALREADY, Outcome.LOST)

    @rule(claim=claims, retryable=st.booleans())
    def fail(self, claim: Claim | None, retryable: bool) -> None:
        if claim is None:
            return
        model, speaks = self.model[claim.job_id], self.speaks(claim)
        outcome = self.worker.fail(claim, retryable=retryable)
        if not speaks:
            assert outcome in (Outcome.ALREADY, Outcome.LOST)
            return
        model.comes_back()
        model.errors += 1
        model.speaker = None
        again = retryable and model.errors < MAX_ERRORS
        if again and model.cancel_asked:
            assert outcome is Outcome.CANCELED
            model.state = JobStatus.CANCELED
        else:
            assert outcome is (Outcome.RETRYING if again else Outcome.FAILED)
            model.state = JobStatus.QUEUED if again else JobStatus.FAILED

    @rule(claim=claims)
    def hand_back(self, claim: Claim | None) -> None:
        if claim is None:
            return
        model = self.model[claim.job_id]
        if self.speaks(claim) and model.state is JobStatus.PROCESSING:
            assert self.store.release([claim]) == (0 if model.cancel_asked else 1)
            model.state = JobStatus.CANCELED if model.cancel_asked else JobStatus.QUEUED
            model.speaker = None
        else:
            assert self.store.release([claim]) == 0

    @rule(claim=claims)
    def cut_off_worker_comes_back(self, claim: Claim | None) -> None:
        if claim is None:
            return
        model, speaks = self.model[claim.job_id], self.speaks(claim)
        (word,) = self.worker.renew(claim, stage="fetch")
        if speaks:
            assert word in ("renewed", "adopted", "cancel")
            model.comes_back()
            model.state = JobStatus.PROCESSING  # and on the device if it was: an attempt never goes back a stage
        else:
            assert word not in ("renewed", "adopted", "cancel")

    @rule(job_id=jobs)
    def its_worker_dies(self, job_id: str) -> None:
        """The lease ends, and a janitor comes by."""
        model = self.model[job_id]
        if model.state is not JobStatus.PROCESSING:
            return
        self.admin.zadd(keys.LEASES, {job_id: 1})
        reaped = self.store.reap("janitor", quiet_s=3600)
        model.crashes += model.on_device
        model.counted = model.on_device
        if model.on_device and model.crashes >= MAX_CRASHES:
            assert reaped.jobs == {job_id: "failed"}
            model.state = JobStatus.FAILED
        elif model.cancel_asked:
            assert reaped.jobs == {job_id: "canceled"}
            model.state = JobStatus.CANCELED
        else:
            assert reaped.jobs == {job_id: "crashed" if model.on_device else "requeued"}
            model.state = JobStatus.QUEUED
        model.on_device = False

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        model = self.model[job_id]
        word = self.store.cancel(job_id)
        if model.state is JobStatus.QUEUED:
            assert word == "canceled"
            model.state = JobStatus.CANCELED
        elif model.state is JobStatus.PROCESSING:
            assert word == "requested"
            model.cancel_asked = True
        else:
            assert word == model.state

    @rule(target=jobs, job_id=jobs)
    def redecode(self, job_id: str) -> Any:
        model, new_id = self.model[job_id], f"redecoded-{next(_ids)}"
        if model.state is JobStatus.EXPIRED:
            with pytest.raises(ResultExpired):
                self.client.redecode(job_id, job_id=new_id)
            return job_id
        self.client.redecode(job_id, job_id=new_id, output="webp")
        self.model[new_id] = Model()
        return new_id

    @rule(job_id=jobs)
    def retention_ends(self, job_id: str) -> None:
        model = self.model[job_id]
        self.store.retire(job_id)
        if model.state.is_terminal:
            model.state = JobStatus.EXPIRED

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def the_books_are_right(self) -> None:
        ids = list(self.model)
        if not ids:
            return
        snapshots = {item.job_id: item for item in self.store.snapshots(ids)}
        queue = keys.rq_queue(keys.queue_name("sd", "normal"))
        queued = [item.decode() for item in self.admin.lrange(queue, 0, -1) if isinstance(item, bytes)]
        for job_id, model in self.model.items():
            assert snapshots[job_id].status is model.state
            assert snapshots[job_id].error_count == model.errors
            assert snapshots[job_id].crash_count == model.crashes
            assert queued.count(job_id) == (model.state is JobStatus.QUEUED)
            leased = self.admin.zscore(keys.LEASES, job_id) is not None
            assert leased == (model.state is JobStatus.PROCESSING)
            owned = self.admin.zscore(keys.owners(self.blob_of(job_id)), job_id) is not None
            assert owned == (model.state is not JobStatus.EXPIRED)
        live = [id_ for id_, model in self.model.items() if model.state in (JobStatus.QUEUED, JobStatus.PROCESSING)]
        names = ("jobs", "latents_bytes", "reserved_bytes", "px")
        totals = {name: int(self.admin.hget(keys.TOTALS, name) or 0) for name in names}
        assert totals["jobs"] == len(live)
        for total in names[1:]:
            held = [self.admin.hget(keys.job(id_), total) for id_ in live]
            assert totals[total] == sum(int(value) for value in held if value is not None), total

    def blob_of(self, job_id: str) -> str:
        """Of latents; a tombstone does not say it any more."""
        blob = self.admin.hget(keys.job(job_id), "blob")
        if isinstance(blob, bytes):
            self.blobs[job_id] = blob.decode()
        return self.blobs[job_id]


@pytest.fixture
def machine(broker_server: EmbeddedBroker) -> type[Jobs]:
    Jobs.server = broker_server
    return Jobs


def test_no_history_loses_a_job_or_ends_it_twice(machine: type[Jobs]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            derandomize=True,
        ),
    )
