"""A worker with a broken device or weights that cannot be loaded: it harms no job, and others take over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from broker_config import job_store, keys
from broker_config.errors import BlobStoreUnknown, DecodeFailed, OutOfMemory
from broker_config.exit_status import EXIT_BROKEN
from broker_config.settings import Settings
from producer import DecodeClient, JobHandle, JobStatus
from tests.support.thread_worker import ThreadWorker, stage_threads
from tests.support.wait import wait_until
from worker import decode_ways, device_stage, fetch_stage
from worker.vae_pool import LoadedVae, VaePool

#: What torch says when a device is lost, and when the host is short of memory.
LOST = "CUDA error: an illegal memory access was encountered"
NO_ROOM = (
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes."
)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that serves nothing for now looks again after this time."""
    monkeypatch.setattr(fetch_stage, "_OUTAGE_PAUSE_S", 0.05)


def submit(client: DecodeClient, *, vae: str = "sd", **options: Any) -> JobHandle:
    latents = np.ones((1, 4, 8, 8), dtype=np.float32)
    return client.submit(latents, vae=vae, provenance=False, **options)


def wait_ready(client: DecodeClient, *vaes: str) -> None:
    wait_until(lambda: client.store.served(vaes) == set(vaes), timeout_s=60, what="the worker")


def lose_device(*_: object, **__: object) -> None:
    raise RuntimeError(LOST)


def queue_of(client: DecodeClient) -> list[str]:
    waiting = client.store.connections.commands.lrange(keys.rq_queue(keys.queue_name("sd", "normal")), 0, -1)
    return [item.decode() for item in waiting if isinstance(item, bytes)]


def reap(client: DecodeClient, job: JobHandle) -> str:
    """What the janitor makes of a job whose lease ended."""
    client.store.reap("janitor", quiet_s=3600)  # the first look starts a grace period
    client.store.connections.commands.hset(keys.REAPER, "grace_ms", 0)
    client.store.connections.commands.zadd(keys.LEASES, {job.id: 1})
    return client.store.reap("janitor", quiet_s=3600).jobs[job.id]


# A broken stage --------------------------------------------------------------------------------------------------


def test_a_job_that_breaks_every_device_fails_and_the_one_behind_it_is_unmarked(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_ways, "free_bytes", lose_device)
    patient = settings.model_copy(update={"lease_s": 60.0})
    deadly, behind = submit(client), submit(client)
    ends = []
    for _ in range(settings.max_crashes):
        with ThreadWorker(patient) as running:
            running._thread.join(60)
            assert running.status == EXIT_BROKEN
        assert deadly.status() is JobStatus.PROCESSING  # left to its lease
        assert behind.status() is JobStatus.QUEUED
        assert stage_threads() == []  # though nobody takes the batch that is ready any more
        ends.append(reap(client, deadly))
    assert ends == ["crashed"] * (settings.max_crashes - 1) + ["failed"]
    assert deadly.snapshot().crash_count == settings.max_crashes
    assert (behind.snapshot().crash_count, behind.snapshot().attempts) == (0, 0)


def test_a_worker_whose_device_is_lost_after_a_failed_decode_ends(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In that process every decode would fail; a new one has a sound device."""
    monkeypatch.setattr(device_stage, "synchronize", lose_device)
    job = submit(client)
    with ThreadWorker(settings.model_copy(update={"lease_s": 60.0})) as running:
        running.gate.on_call = lose_device
        running._thread.join(60)
        assert running.status == EXIT_BROKEN
    assert (job.snapshot().status, job.snapshot().error_count) == (JobStatus.PROCESSING, 0)
    assert reap(client, job) == "crashed"


def test_a_fetch_stage_that_breaks_leaves_the_device_the_time_to_finish(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store was set up after this worker started: it ends; what it decodes meanwhile is neither lost nor marked."""
    monkeypatch.setattr(job_store, "ALONG_BYTES", 0)  # latents in a store do not come along
    with ThreadWorker(settings) as running:
        running.gate.close()
        decoding = submit(client)
        assert running.gate.reached.wait(60)
        running.worker._blobs.get_many = lambda refs: [BlobStoreUnknown("set LATENTQ_BLOB_STORE") for _ in refs]  # type: ignore[method-assign]
        other = submit(client)
        assert running.worker._broken.wait(60)
        running.gate.open()
        running._thread.join(60)
        assert running.status == EXIT_BROKEN
    assert decoding.snapshot().status is JobStatus.SUCCEEDED
    assert (other.snapshot().status, other.snapshot().attempts) == (JobStatus.QUEUED, 0)


# Weights that cannot be loaded -----------------------------------------------------------------------------------


class Loads:
    """Breaks the loading of VAEs in a worker under test."""

    def __init__(self, pool: VaePool) -> None:
        self._load = pool._load
        self._pool = pool
        self.tries: list[str] = []
        #: Raises what loading is to raise.
        self.breaks: Callable[[str], None] = lambda name: None
        pool._load = self.load  # type: ignore[method-assign]

    def load(self, entry: Any) -> LoadedVae:
        self.tries.append(entry.name)
        self.breaks(entry.name)
        return self._load(entry)


def raising(error: Exception, *, name: str) -> Callable[[str], None]:
    def breaks(loaded: str) -> None:
        if loaded == name:
            raise error

    return breaks


def serving(client: DecodeClient, vae: str) -> list[bytes]:
    return client.store.connections.commands.zrange(keys.serving(vae), 0, -1)  # type: ignore[return-value]


@pytest.mark.parametrize("error", [RuntimeError(NO_ROOM), MemoryError(), OSError(24, "Too many open files")], ids=repr)
def test_a_vae_that_cannot_be_loaded_now_rests_and_its_jobs_go_back_unmarked(
    error: Exception, client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadWorker(settings, vaes=("sd", "sdxl"), name="sick") as running:
        wait_ready(client, "sd", "sdxl")
        loads = Loads(running.worker.pool)
        running.worker.pool.evict_all_but("sdxl")
        loads.breaks = raising(error, name="sd")
        jobs = [submit(client) for _ in range(3)]
        wait_until(
            lambda: serving(client, "sd") == [], timeout_s=60, what="the worker to say that it does not serve it"
        )
        snapshots = [job.snapshot() for job in jobs]
        assert [(item.status, item.attempts, item.error_count) for item in snapshots] == [(JobStatus.QUEUED, 0, 0)] * 3
        assert [item.served for item in snapshots] == [False] * 3
        assert queue_of(client) == [job.id for job in jobs]
        assert submit(client, vae="sdxl").wait(60).status is JobStatus.SUCCEEDED  # the other VAE is sound

        loads.breaks = lambda name: None
        until, rest_s = running.worker._fetch._resting["sd"]
        assert rest_s == fetch_stage._REST_FIRST_S
        running.worker._fetch._resting["sd"] = (until - rest_s, rest_s)  # it has rested
        assert [job.wait(60).status for job in jobs] == [JobStatus.SUCCEEDED] * 3
        wait_until(lambda: serving(client, "sd") == [b"sick"], what="the worker to say that it serves it again")


def test_a_vae_that_still_cannot_be_loaded_rests_longer(client: DecodeClient, settings: Settings) -> None:
    rests = []
    with ThreadWorker(settings) as running:
        wait_ready(client, "sd")
        loads, stage = Loads(running.worker.pool), running.worker._fetch
        running.worker.pool.evict_all_but("")
        loads.breaks = raising(RuntimeError(NO_ROOM), name="sd")
        job = submit(client)
        for number in range(8):
            wait_until(lambda number=number: len(loads.tries) > number and stage.served() == (), what="a try")  # type: ignore[misc]
            until, rest_s = stage._resting["sd"]
            rests.append(rest_s)
            stage._resting["sd"] = (until - rest_s, rest_s)
        job.cancel()
    assert rests == [15.0, 30.0, 60.0, 120.0, 240.0, 480.0, 600.0, 600.0]


def test_other_vaes_make_room_for_one_that_does_not_fit(client: DecodeClient, settings: Settings) -> None:
    with ThreadWorker(settings, vaes=("sd", "sdxl")) as running:
        wait_ready(client, "sd", "sdxl")
        pool = running.worker.pool
        loads = Loads(pool)
        pool.evict_all_but("sdxl")

        def too_tight(name: str) -> None:
            if len(pool.loaded()) > 0:
                raise OutOfMemory("no room")

        loads.breaks = too_tight
        snapshot = submit(client).wait(60)
        assert (snapshot.status, snapshot.attempts) == (JobStatus.SUCCEEDED, 1)
        assert pool.loaded() == ["sd"]
        assert loads.tries == ["sd", "sd"]


def test_a_worker_whose_device_is_lost_while_it_loads_ends(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadWorker(settings) as running:
        wait_ready(client, "sd")
        loads = Loads(running.worker.pool)
        running.worker.pool.evict_all_but("")
        monkeypatch.setattr(fetch_stage, "synchronize", lose_device)
        loads.breaks = raising(RuntimeError(LOST), name="sd")
        job = submit(client)
        running._thread.join(60)
        assert running.status == EXIT_BROKEN
    assert (job.snapshot().status, job.snapshot().attempts) == (JobStatus.QUEUED, 0)


def test_a_worker_starts_with_a_vae_that_has_no_room_yet(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = ThreadWorker(settings, vaes=("sd", "sdxl"))
    loads = Loads(running.worker.pool)
    running.worker.pool.evict_all_but("")
    loads.breaks = raising(torch.OutOfMemoryError("CUDA out of memory"), name="sdxl")
    with running:
        wait_ready(client, "sd", "sdxl")
        loads.breaks = lambda name: None
        assert submit(client, vae="sdxl").wait(60).status is JobStatus.SUCCEEDED


# Another worker --------------------------------------------------------------------------------------------------


def test_what_fails_on_one_worker_is_tried_by_another(client: DecodeClient, settings: Settings) -> None:
    with ThreadWorker(settings, name="sound") as sound, ThreadWorker(settings, name="sick") as sick:
        wait_until(lambda: len(serving(client, "sd")) == 2, what="both workers")
        sick.gate.on_call = lose_device
        sound.gate.close()
        jobs = [submit(client) for _ in range(8)]
        assert sick.gate.reached.wait(60)
        sound.gate.open()
        snapshots = [job.wait(60) for job in jobs]
        for item in snapshots:
            assert item.status is JobStatus.SUCCEEDED
            assert item.worker == "sound"
            assert item.error_count <= 1
            assert {error["code"] for error in item.errors} <= {DecodeFailed.code}
        assert len(sick.gate.calls) == sum(item.error_count for item in snapshots) > 0
