"""A job goes the whole way: producer process → broker → worker process → result, over both kinds of broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from broker_config.connection import connect_url
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.settings import load_settings
from broker_config.supported_servers import verify_server
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient, JobStatus
from tests.conftest import need_tool
from tests.support.processes import WorkerProcesses


@pytest.fixture(params=["embedded", "redis-server"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """The embedded broker as it comes, and a plain `redis-server` from PATH (7.0 on Debian 12)."""
    binary = None if request.param == "embedded" else Path(need_tool("redis-server"))
    with EmbeddedBroker(tmp_path / "broker", binary=binary) as server:
        yield server


def test_latents_submitted_here_are_decoded_by_a_worker_process(broker: EmbeddedBroker, tiny_catalog: Path) -> None:
    settings = load_settings(redis_url=broker.url, catalog=tiny_catalog, lease_s=2.0, lease_renew_s=0.5, _env_file=None)
    connections = connect_url(broker.url, name="smoke")
    verify_server(connections.commands)
    client = DecodeClient(connections, settings=settings, catalog=VaeCatalog.load(tiny_catalog))
    workers = WorkerProcesses(settings)
    try:
        workers.start("sd")
        job = client.submit(torch.randn(2, 4, 8, 16), vae="sd", metadata={"prompt": "a test"})
        assert job.wait(timeout=120).status is JobStatus.SUCCEEDED
        pictures = job.images()
    finally:
        workers.stop_all()
        connections.close()
    assert [picture.size for picture in pictures] == [(128, 64), (128, 64)]
    assert pictures[0].info["prompt"] == "a test"
