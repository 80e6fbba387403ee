"""The VAE pool: what stays loaded, what goes, and that loading holds up nobody who decodes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient, JobStatus
from tests.support.thread_worker import ThreadWorker
from tests.support.wait import wait_until
from worker.vae_pool import VaePool

CPU = torch.device("cpu")


@pytest.fixture
def catalog(settings: Settings) -> VaeCatalog:
    return VaeCatalog.load(settings.catalog)


def size_of(catalog: VaeCatalog, name: str) -> int:
    return VaePool(catalog, device=CPU).get(name).size_bytes


def test_size_is_that_of_parameters_and_buffers(catalog: VaeCatalog) -> None:
    vae = VaePool(catalog, device=CPU).get("sd")
    assert vae.size_bytes == sum(item.nbytes for item in vae.module.state_dict().values())


def test_the_least_recently_used_vae_goes_first(catalog: VaeCatalog) -> None:
    room = size_of(catalog, "sd") + size_of(catalog, "sdxl") + size_of(catalog, "flux")
    pool = VaePool(catalog, device=CPU, max_bytes=room)
    for name in ("sd", "sdxl", "flux"):
        pool.get(name)
    assert pool.loaded() == ["sd", "sdxl", "flux"]
    pool.get("sd")
    pool.get("hunyuanvideo")
    assert pool.loaded()[-2:] == ["sd", "hunyuanvideo"]
    assert "sdxl" not in pool.loaded()


def test_a_vae_larger_than_the_budget_is_loaded_all_the_same_and_alone(catalog: VaeCatalog) -> None:
    pool = VaePool(catalog, device=CPU, max_bytes=1)
    pool.get("sd")
    assert pool.is_full
    pool.get("sdxl")
    assert pool.loaded() == ["sdxl"]


def test_a_vae_that_is_used_outlives_its_eviction(catalog: VaeCatalog) -> None:
    pool = VaePool(catalog, device=CPU)
    held = pool.get("sd")
    pool.get("sdxl")
    assert pool.evict_all_but("sdxl") == 1
    assert held.module.decode(torch.zeros(1, 4, 8, 8), return_dict=False)[0].shape == (1, 3, 64, 64)
    assert pool.get("sd") is not held


def test_threads_that_ask_at_once_share_one_load(catalog: VaeCatalog) -> None:
    pool = VaePool(catalog, device=CPU)
    start, got = threading.Barrier(6), []

    def ask() -> None:
        start.wait()
        got.append(pool.get("sd"))

    threads = [threading.Thread(target=ask, name="asks") for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(vae) for vae in got}) == 1


def test_another_vae_is_loaded_while_the_device_decodes(client: DecodeClient, settings: Settings) -> None:
    first, second = (client.submit(np.ones((1, 4, 8, 8), dtype=np.float32), vae=vae) for vae in ("sd", "sdxl"))
    with ThreadWorker(settings, vaes=("sd", "sdxl"), pool_bytes=1) as running:
        running.gate.close()
        assert running.gate.reached.wait(60)
        wait_until(lambda: running.worker.pool.loaded() == ["sdxl"], timeout_s=60, what="the other VAE to be loaded")
        assert first.status() is JobStatus.PROCESSING
        running.gate.open()
        assert first.wait(60).status is JobStatus.SUCCEEDED
        assert second.wait(60).status is JobStatus.SUCCEEDED


def test_a_worker_loads_as_many_as_the_pool_holds_before_it_is_ready(client: DecodeClient, settings: Settings) -> None:
    with ThreadWorker(settings, vaes=("sd",), pool_bytes=1) as running:
        wait_until(lambda: client.store.served({"sd"}), timeout_s=60, what="the worker")
        assert running.worker.pool.loaded() == ["sd"]
