"""Large latents and artifacts go the whole way over a folder or a bucket: producer, worker process, result, janitor."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import redis
import torch

from broker_config import keys
from broker_config.blob_store import REDIS_STORE
from broker_config.connection import Connections
from broker_config.errors import BlobStoreUnavailable, ConfigurationError
from broker_config.external_store import ExternalStore
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.settings import Settings, load_settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient
from tests.support.external_stores import names_in
from tests.support.processes import ROOT, WorkerProcesses, environment_of
from tests.support.s3_server import S3Server
from tests.support.tcp_proxy import TcpProxy
from tests.support.wait import wait_until
from worker.blob_sweeper import BlobSweeper
from worker.decode_worker import DecodeWorker
from worker.janitor import Janitor
from worker.settings import load_worker_settings

LATENTS = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(7))
PATIENCE_S = 90.0


@pytest.mark.slow
def test_large_latents_and_artifacts_pass_through_the_store_and_leave_it_with_their_jobs(
    client: DecodeClient,
    workers: WorkerProcesses,
    store: JobStore,
    outer: ExternalStore,
    sweeper: BlobSweeper,
    admin: redis.Redis,
) -> None:
    workers.start("sd")
    first = client.submit(LATENTS, vae="sd", output="tensor")
    assert first.wait(timeout=PATIENCE_S).status is JobStatus.SUCCEEDED
    snapshot = first.snapshot()
    assert snapshot.request is not None
    assert snapshot.result is not None
    refs = [snapshot.request.latents, *(item.blob for item in snapshot.result.artifacts)]
    assert {ref.store for ref in refs} == {outer.read_id()}
    assert names_in(outer) == {ref.name for ref in refs}
    assert admin.keys(keys.blob("*")) == []
    assert first.tensor().shape == (2, 3, 128, 128)

    second = first.redecode(output="jpg")  # two small pictures, which lie in the broker
    assert second.wait(timeout=PATIENCE_S).status is JobStatus.SUCCEEDED
    assert {item.blob.store for item, _ in second.artifacts()} <= {REDIS_STORE, outer.read_id()}

    first.ack()
    sweeper.sweep()
    assert refs[0].name in names_in(outer)
    assert not {ref.name for ref in refs[1:]} & names_in(outer)
    third = second.redecode(output="png", retention_s=0.01)  # its latents outlive the job they came with
    assert third.wait(timeout=PATIENCE_S).status in (JobStatus.SUCCEEDED, JobStatus.EXPIRED)
    second.ack()

    def all_gone() -> bool:
        Janitor(store, name="janitor").tick()
        sweeper.sweep()
        return not names_in(outer)

    wait_until(all_gone, what="the end of the last retention")


@pytest.mark.slow
def test_a_worker_waits_for_a_bucket_that_is_away_and_fails_no_job(
    s3_place: dict[str, Any],
    s3_server: S3Server,
    broker_url: str,
    tiny_catalog: Any,
    connections: Any,
    tmp_path: Any,
) -> None:
    port = urlsplit(s3_server.endpoint).port
    assert port is not None
    common: dict[str, Any] = {"redis_url": broker_url, "catalog": tiny_catalog, "_env_file": None}
    client = DecodeClient(connections, settings=load_settings(**common, **s3_place))
    with TcpProxy(port) as proxy:
        workers = WorkerProcesses(load_settings(**common, **(s3_place | {"s3_endpoint": proxy.endpoint})))
        try:
            process = workers.start("sd")
            proxy.cut()
            proxy.cut_next = 1_000_000
            job = client.submit(LATENTS, vae="sd", output="tensor")
            wait_until(lambda: "broker_away" in workers.log(process), timeout_s=PATIENCE_S, what="the worker to notice")
            assert job.status() is JobStatus.PROCESSING
            proxy.cut_next = 0
            snapshot = job.wait(timeout=PATIENCE_S)
            assert (snapshot.status, snapshot.attempts) == (JobStatus.SUCCEEDED, 1)
            assert job.tensor().shape == (2, 3, 128, 128)
        finally:
            workers.stop_all()


def test_a_submit_to_a_store_that_is_away_says_the_id_and_accepts_nothing(
    s3_place: dict[str, Any], broker_url: str, connections: Any, admin: redis.Redis
) -> None:
    settings = load_settings(redis_url=broker_url, _env_file=None, **s3_place)
    DecodeClient(connections, settings=settings).blobs.verify()
    with TcpProxy(9) as nothing:
        away = nothing.endpoint
    client = DecodeClient(connections, settings=settings.model_copy(update={"s3_endpoint": away}))
    with pytest.raises(BlobStoreUnavailable) as caught:
        client.submit(np.zeros((1, 4, 16, 16), np.float32), vae="sd", job_id="mine")
    assert caught.value.job_id == "mine"
    assert caught.value.retryable
    assert not admin.exists(keys.job("mine"))


@pytest.fixture
def without_store(settings: Settings) -> Settings:
    """Settings of a process whose operator forgot the store."""
    return settings.model_copy(update={"blob_store": None})


class TestMisconfigured:
    """A process that does not reach the store fails no job."""

    @pytest.fixture
    def place(self, file_place: dict[str, Any]) -> dict[str, Any]:
        """In a folder."""
        return file_place

    def test_a_worker_that_does_not_reach_the_store_does_not_start(
        self, client: DecodeClient, without_store: Settings, connections: Connections
    ) -> None:
        client.blobs.verify()
        worker = DecodeWorker(
            connections,
            settings=without_store,
            worker_settings=load_worker_settings(vaes=("sd",)),
            catalog=VaeCatalog.load(without_store.catalog),
        )
        with pytest.raises(ConfigurationError, match="LATENTQ_BLOB_STORE is not set here"):
            worker.run()

    @pytest.mark.slow
    def test_a_job_whose_store_was_set_up_after_the_worker_goes_back_and_the_worker_ends(
        self, client: DecodeClient, without_store: Settings
    ) -> None:
        workers = WorkerProcesses(without_store)
        try:
            process = workers.start("sd")
            job = client.submit(LATENTS, vae="sd", output="tensor")
            assert process.wait(timeout=PATIENCE_S) == 70
            assert "set LATENTQ_BLOB_STORE" in workers.log(process)
            snapshot = job.snapshot()
            assert (snapshot.status, snapshot.error_count, snapshot.attempts) == (JobStatus.QUEUED, 0, 0)
        finally:
            workers.stop_all()

    def test_a_janitor_process_deletes_what_is_due(
        self, client: DecodeClient, settings: Settings, outer: ExternalStore, admin: redis.Redis
    ) -> None:
        ref = client.blobs.put("orphan", b"x" * 5000)
        admin.zadd(keys.external(ref.store), {ref.name: 1})
        admin.zadd(keys.doomed(ref.store), {"older": 1})
        outer.write("older", b"x")
        janitor = subprocess.Popen(
            [sys.executable, "-m", "worker.janitor"], env=environment_of(settings) | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
        )
        try:
            wait_until(lambda: names_in(outer) == {ref.name}, timeout_s=PATIENCE_S, what="the first deletion")
            wait_until(lambda: admin.zscore(keys.doomed(ref.store), ref.name), what="the second decision")
        finally:
            janitor.send_signal(signal.SIGTERM)
            assert janitor.wait(timeout=30) == 0
