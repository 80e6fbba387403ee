"""Fixtures of the farm: a tiny pipeline in the demo VAE's latent space, and a worker that decodes what it makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker_config.settings import Settings
from tests.support.thread_worker import ThreadWorker
from tests.support.tiny_pipelines import save_tiny_pipeline, tiny_pipeline


@pytest.fixture(scope="session")
def pipeline() -> Any:
    """A pipeline without its VAE."""
    return tiny_pipeline()


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved."""
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def worker(settings: Settings) -> Iterator[ThreadWorker]:
    """A worker in this process that serves the demo VAE."""
    with ThreadWorker(settings, vaes=["demo"]) as running:
        yield running
