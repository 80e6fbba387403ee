"""Warm-up: VAEs have decoded once before the worker says it is ready, and batches have the size that was measured."""

from __future__ import annotations

import pytest
import torch

from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient
from tests.support.thread_worker import ThreadWorker
from tests.support.wait import wait_until
from worker.vae_pool import LoadedVae, VaePool
from worker.warm_up import WarmUp, smallest_latents


def load(settings: Settings, name: str) -> LoadedVae:
    return VaePool(VaeCatalog.load(settings.catalog), device=torch.device("cpu")).get(name)


@pytest.mark.parametrize(
    ("name", "shape"), [("sd", (1, 4, 8, 8)), ("flux", (1, 16, 8, 8)), ("hunyuanvideo", (1, 16, 1, 8, 8))]
)
def test_a_vae_is_warmed_with_what_its_own_decode_takes(settings: Settings, name: str, shape: tuple[int, ...]) -> None:
    vae = load(settings, name)
    assert smallest_latents(vae).shape == shape
    seen: list[tuple[int, ...]] = []
    vae.module.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    WarmUp(calibrate=False).run(vae)
    assert seen
    assert not vae.lock.locked()


def test_the_budget_of_a_batch_is_measured_where_jobs_may_share_one(settings: Settings) -> None:
    vae = load(settings, "sd")
    warm_up = WarmUp(calibrate=True)
    warm_up.run(vae)
    assert warm_up.budgets_px.keys() == {"sd"}
    assert warm_up.budgets_px["sd"] > 0


def test_a_vae_that_cannot_be_warmed_up_is_served_all_the_same(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    vae = load(settings, "sd")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no zeros, please")

    vae.module.decode = broken
    WarmUp(calibrate=False).run(vae)
    assert [record.action for record in caplog.records if record.levelname == "WARNING"] == ["warm_up_failed"]  # type: ignore[attr-defined]
    assert not vae.lock.locked()


def test_a_worker_is_warm_before_it_says_that_it_is_ready(
    client: DecodeClient, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with ThreadWorker(settings):
        wait_until(lambda: client.store.served({"sd"}), timeout_s=60, what="the worker")
    actions = [getattr(record, "action", None) for record in caplog.records]
    assert actions.index("vae_warm") < actions.index("worker_ready")


def test_a_worker_batches_by_what_it_measured(client: DecodeClient, settings: Settings) -> None:
    with ThreadWorker(settings, mode="fast", max_batch_px=None) as running:
        wait_until(lambda: client.store.served({"sd"}), timeout_s=60, what="the worker")
        assert running.worker._fetch._max_px["sd"] > 0
