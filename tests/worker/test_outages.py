"""Broker or store away: what was decoded is kept, nothing counts as a hang, and a worker starts when they are back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from broker_config import keys
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import BlobStoreUnavailable
from broker_config.exit_status import EXIT_AWAY, EXIT_UNUSABLE
from broker_config.settings import Settings
from producer import DecodeClient, JobHandle, JobStatus
from producer.supervisor import Supervisor
from tests.support.faulty_proxy import FaultyProxy
from tests.support.processes import ROOT, environment_of
from tests.support.thread_worker import ThreadWorker
from tests.support.wait import wait_until
from worker import finish_stage, stages

#: Longest time of a stage here, and pauses between tries that are short beside it.
LIMIT_S = 2.0
PAUSE_S = 0.1
#: 320 × 320 × 12 bytes as a tensor: too large to come along with the success.
LARGE = (1, 4, 40, 40)


@pytest.fixture
def settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(finish_stage, "_STORE_LIMIT_S", LIMIT_S)
    monkeypatch.setattr(finish_stage, "_ROOM_S", PAUSE_S)
    monkeypatch.setattr(stages, "_RETRY_LONGEST_S", PAUSE_S)
    return settings.model_copy(update={"timeout_min_s": 0.1})


def submit(client: DecodeClient, *, shape: tuple[int, ...] = (1, 4, 8, 8), **options: Any) -> JobHandle:
    latents = np.ones(shape, dtype=np.float32)
    return client.submit(latents, vae="sd", provenance=False, **({"timeout_s": LIMIT_S} | options))


@pytest.fixture
def hangs() -> list[str]:
    """Stages that the worker under test took for hung."""
    return []


@pytest.fixture
def watched(hangs: list[str]) -> Callable[[ThreadWorker], ThreadWorker]:
    """Notes hangs instead of ending pytest's process."""

    def watch(running: ThreadWorker) -> ThreadWorker:
        running.worker._leases._on_hang = lambda claim, stage: hangs.append(stage)
        return running

    return watch


def wait_out(limit_s: float) -> None:
    """Until the time of a stage is over, with some to spare, and the lease keeper has looked."""
    start = time.monotonic()
    wait_until(lambda: time.monotonic() - start > 1.5 * limit_s + 1.0, what="the time of a stage to be over")


def test_a_broker_away_for_longer_than_a_stage_may_take_costs_nothing(
    client: DecodeClient,
    settings: Settings,
    broker_server: EmbeddedBroker,
    hangs: list[str],
    watched: Callable[[ThreadWorker], ThreadWorker],
) -> None:
    with FaultyProxy(broker_server.url) as proxy:
        far = settings.model_copy(update={"redis_url": SecretStr(proxy.url)})
        job = submit(client, timeout_s=60.0)
        with watched(ThreadWorker(far)) as running:
            running.gate.close()
            assert running.gate.reached.wait(60)
            with proxy.refused():
                running.gate.open()
                wait_until(
                    lambda: [item.stage for item in running.worker._leases._held.values()] == ["finish"],
                    what="the decoded job to wait for the broker",
                )
                wait_out(LIMIT_S)
            assert job.wait(60).status is JobStatus.SUCCEEDED
            assert len(running.gate.calls) == 1
    assert hangs == []


class Bucket:
    """A store of large blobs that can be away."""

    def __init__(self, running: ThreadWorker) -> None:
        self.away = threading.Event()
        self.refused = 0
        blobs = running.worker._blobs
        self._put = blobs.put
        blobs.put = self.put  # type: ignore[method-assign]

    def put(self, *args: Any, **options: Any) -> Any:
        if self.away.is_set():
            self.refused += 1
            raise BlobStoreUnavailable("the bucket is away")
        return self._put(*args, **options)


def test_a_bucket_away_for_longer_than_a_stage_may_take_costs_nothing(
    client: DecodeClient,
    settings: Settings,
    hangs: list[str],
    watched: Callable[[ThreadWorker], ThreadWorker],
) -> None:
    with watched(ThreadWorker(settings)) as running:
        bucket = Bucket(running)
        bucket.away.set()
        job = submit(client, shape=LARGE, output="tensor")
        wait_until(lambda: bucket.refused, timeout_s=60, what="the first try to store")
        wait_out(LIMIT_S)
        bucket.away.clear()
        snapshot = job.wait(60)
    assert (snapshot.status, snapshot.attempts, hangs) == (JobStatus.SUCCEEDED, 1, [])


def test_a_device_that_waits_for_jobs_that_cannot_be_stored_does_not_hang(
    client: DecodeClient,
    settings: Settings,
    hangs: list[str],
    watched: Callable[[ThreadWorker], ThreadWorker],
) -> None:
    """The decoded jobs wait for the bucket, and the one behind them for their place."""
    with watched(ThreadWorker(settings)) as running:
        bucket = Bucket(running)
        bucket.away.set()
        jobs = [submit(client, shape=LARGE, output="tensor") for _ in range(finish_stage._FINISHERS + 3)]
        last = keys.job(jobs[-1].id)
        admin = client.store.connections.commands
        wait_until(lambda: admin.hget(last, "stage") == b"device", timeout_s=60, what="the last job on the device")
        wait_until(lambda: len(running.gate.calls) == len(jobs), timeout_s=60, what="its decode")
        wait_out(LIMIT_S)
        bucket.away.clear()
        snapshots = [job.wait(60) for job in jobs]
    assert [(item.status, item.attempts) for item in snapshots] == [(JobStatus.SUCCEEDED, 1)] * len(jobs)
    assert hangs == []


def test_a_clip_whose_frames_nobody_takes_yet_does_not_hang(
    client: DecodeClient,
    settings: Settings,
    hangs: list[str],
    watched: Callable[[ThreadWorker], ThreadWorker],
) -> None:
    """Both finishers hold jobs that cannot be stored; the clip comes off the device in more pieces than may wait."""
    frames = 1 + 4 * 64
    latents = np.ones((1, 16, (frames - 1) // 4 + 1, 4, 4), dtype=np.float32)
    with watched(ThreadWorker(settings, vaes=("sd", "hunyuanvideo"))) as running:
        bucket = Bucket(running)
        bucket.away.set()
        stuck = [submit(client, shape=LARGE, output="tensor") for _ in range(finish_stage._FINISHERS)]
        wait_until(lambda: bucket.refused >= len(stuck), timeout_s=60, what="the first tries to store")
        clip = client.submit(latents, vae="hunyuanvideo", output="png", provenance=False, timeout_s=LIMIT_S)
        last = keys.job(clip.id)
        admin = client.store.connections.commands
        wait_until(lambda: int(admin.hget(last, "done") or 0) > 0, timeout_s=60, what="the clip's first frames")
        wait_out(LIMIT_S)
        assert admin.hget(last, "stage") == b"device"
        bucket.away.clear()
        snapshots = [job.wait(60) for job in (*stuck, clip)]
    assert [(item.status, item.attempts) for item in snapshots] == [(JobStatus.SUCCEEDED, 1)] * 3
    assert hangs == []


# Starting --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(settings: Settings) -> Settings:
    """Settings with a broker that does not answer."""
    return settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})


@pytest.mark.slow
def test_a_worker_that_finds_no_broker_ends_as_one_that_is_worth_starting_again(nowhere: Settings) -> None:
    command = [sys.executable, "-m", "worker", "--vae", "sd"]
    ended = subprocess.run(command, env=environment_of(nowhere), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == EXIT_AWAY == os.EX_TEMPFAIL
    assert "[broker_unreachable]" in ended.stderr


def run_to_its_end(settings: Settings, module: str, **changed: str) -> subprocess.CompletedProcess[str]:
    """A service that does not start."""
    environment = environment_of(settings) | changed
    command = [sys.executable, "-m", module]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("module", ["worker.janitor", "worker.courier", "producer.gateway"])
def test_a_service_whose_broker_does_not_run_yet_ends_as_one_that_is_worth_starting_again(
    module: str, settings: Settings, tmp_path: Path
) -> None:
    """Or `latentq up` would take it for one that cannot work, and end everything with it."""
    links = {"LATENTQ_PUBLIC_URL": "https://example.org", "LATENTQ_LINK_KEY": "5" * 64}
    ended = run_to_its_end(settings, module, LATENTQ_REDIS_URL="", LATENTQ_DATA_DIR=str(tmp_path), **links)
    assert ended.returncode == EXIT_AWAY, ended.stderr
    assert "[broker_not_running]" in ended.stderr


def test_a_gateway_that_finds_no_broker_ends_as_one_that_is_worth_starting_again(nowhere: Settings) -> None:
    """It looks for keys before it listens."""
    ended = run_to_its_end(nowhere, "producer.gateway", LATENTQ_GATEWAY_AUTH="required")
    assert ended.returncode == EXIT_AWAY, ended.stderr
    assert "[broker_unreachable]" in ended.stderr


def test_a_service_that_cannot_work_as_configured_ends_for_good(settings: Settings) -> None:
    ended = run_to_its_end(settings, "worker.courier")
    assert ended.returncode == EXIT_UNUSABLE, ended.stderr
    assert "LATENTQ_LINK_KEY" in ended.stderr


@pytest.mark.slow
def test_a_worker_whose_name_a_killed_one_still_has_ends_as_one_that_is_worth_starting_again(
    client: DecodeClient, settings: Settings
) -> None:
    """Or its supervisor would take it for one that cannot work, and end everything."""
    client.store.connections.commands.hset("rq:worker:box-1", mapping={"state": "busy"})
    client.store.connections.commands.expire("rq:worker:box-1", 60)  # as long as RQ's workers have
    command = [sys.executable, "-m", "worker", "--vae", "sd", "--name", "box-1"]
    ended = subprocess.run(command, env=environment_of(settings), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == EXIT_AWAY
    assert "[worker_name_taken]" in ended.stderr


@pytest.mark.parametrize(("status", "restarted"), [(EXIT_AWAY, True), (70, True), (2, False)])
def test_up_starts_it_again_but_not_what_cannot_work_as_configured(
    status: int, restarted: bool, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    code = f"import sys; open({str(starts)!r}, 'a').write('x'); sys.exit({status})"
    supervisor = Supervisor()
    supervisor.start("worker", [sys.executable, "-c", code], environment={})
    said: list[str | None] = []

    def over() -> bool:
        said.append(supervisor.check())
        return said[-1] is not None or (starts.exists() and len(starts.read_text()) == 2)

    try:
        wait_until(over, what="the second start, or the end")
    finally:
        supervisor.stop()
    assert (said[-1] is None) == restarted
