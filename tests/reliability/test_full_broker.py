"""A broker that cannot take more, or cannot write: nothing is half-written, what runs goes on, nothing is lost."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from PIL import Image
from pydantic import SecretStr

from broker_config import keys
from broker_config.blob_store import INLINE_BYTES
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import BrokerRefusesWrites, QueueFull
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient, JobStatus
from tests.support.broker_contents import assert_same, everything
from tests.support.thread_worker import ThreadWorker
from tests.support.wait import wait_until

SMALL = np.ones((1, 4, 8, 8), dtype=np.float32)
#: Latents that do not travel with the job, and whose decoded tensor (768 × 768 × 12 bytes) does not either.
LARGE = np.ones((1, 4, 96, 96), dtype=np.float32)


@contextmanager
def full(admin: Any) -> Iterator[None]:
    """A broker whose memory is used up: plain writes are refused."""
    before = admin.config_get("maxmemory")["maxmemory"]
    admin.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            admin.set("latentq:test", "x", px=1)
        yield
    finally:
        admin.config_set("maxmemory", before)


@pytest.mark.parametrize("side", [8, 272], ids=["small", "large"])
def test_a_full_broker_refuses_latents_and_keeps_nothing_of_them(
    side: int, client: DecodeClient, broker_url: str
) -> None:
    latents = np.ones((1, 4, side, side), dtype=np.float32)
    assert (latents.nbytes > INLINE_BYTES) == (side == 272)
    with redis.Redis.from_url(broker_url) as admin:
        before = everything(admin)
        with full(admin), pytest.raises(QueueFull, match="maxmemory") as caught:
            client.submit(latents, vae="sd", job_id="refused")
        assert_same(before, everything(admin))
    assert (caught.value.job_id, caught.value.retryable) == ("refused", True)
    assert caught.value.retry_after_s > 0
    assert client.submit(latents, vae="sd", job_id="refused").status() is JobStatus.QUEUED


def test_a_submit_that_may_wait_gets_in_when_there_is_room(client: DecodeClient, settings: Settings) -> None:
    limited = DecodeClient(
        client.store.connections,
        settings=settings.model_copy(update={"max_pending_jobs": 1}),
        catalog=VaeCatalog.load(settings.catalog),
    )
    first = limited.submit(SMALL, vae="sd")
    with pytest.raises(QueueFull):
        limited.submit(SMALL, vae="sd")
    with ThreadWorker(settings):
        second = limited.submit(SMALL, vae="sd", block_s=60)
        assert first.wait(60).status is JobStatus.SUCCEEDED
        assert second.wait(60).status is JobStatus.SUCCEEDED


def test_in_a_full_broker_leases_are_renewed_and_results_stored(
    client: DecodeClient, settings: Settings, broker_url: str
) -> None:
    jobs = [
        client.submit(SMALL, vae="sd", output="png"),
        client.submit(LARGE, vae="sd", output="tensor"),
        client.submit(SMALL, vae="sd", output="webp"),
    ]
    with redis.Redis.from_url(broker_url) as admin, ThreadWorker(settings) as running:
        running.gate.close()
        assert running.gate.reached.wait(60)
        with full(admin):
            first = admin.zscore(keys.LEASES, jobs[0].id)
            wait_until(lambda: admin.zscore(keys.LEASES, jobs[0].id) > first + settings.lease_s * 1000, what="renewals")
            running.gate.open()
            ended = [job.wait(60) for job in jobs]
    assert [(item.status, item.attempts) for item in ended] == [(JobStatus.SUCCEEDED, 1)] * 3
    assert Image.open(io.BytesIO(jobs[0].artifacts()[0][1])).size == (64, 64)
    assert jobs[1].artifacts()[0][0].blob.size_bytes > 768 * 768 * 3 * 4 > INLINE_BYTES
    assert jobs[2].snapshot().error_count == 0


# A disk that is full --------------------------------------------------------------------------------------------


class BrokenDisk:
    """Makes a broker's snapshots fail, as a full disk does; the broker then refuses every write with MISCONF."""

    def __init__(self, admin: Any) -> None:
        self._admin = admin
        config = admin.config_get("dir", "dbfilename")
        self._in_the_way = Path(config["dir"]) / config["dbfilename"]

    def break_it(self) -> None:
        """From now on nothing can be written."""
        self._in_the_way.unlink(missing_ok=True)
        self._in_the_way.mkdir()  # a file cannot be renamed onto a folder
        self._admin.config_set("save", "3600 1")
        self._snapshot("err")

    def mend(self) -> None:
        """Writes go on."""
        self._in_the_way.rmdir()
        self._snapshot("ok")

    def _snapshot(self, expected: str) -> None:
        self._admin.bgsave()
        wait_until(
            lambda: (
                self._admin.info("persistence")["rdb_bgsave_in_progress"] == 0
                and self._admin.info("persistence")["rdb_last_bgsave_status"] == expected
            ),
            what=f"a snapshot that ends {expected}",
        )


def test_a_broker_whose_disk_is_full_says_so_and_work_goes_on_when_it_is_not(
    settings: Settings, tmp_path: Path
) -> None:
    with EmbeddedBroker(tmp_path) as broker, redis.Redis.from_url(broker.url) as admin:
        own = settings.model_copy(update={"redis_url": SecretStr(broker.url)})
        with DecodeClient.from_url(broker.url, catalog=settings.catalog, _env_file=None) as client:
            job = client.submit(SMALL, vae="sd")
            with ThreadWorker(own) as running:
                running.gate.close()
                assert running.gate.reached.wait(60)
                disk = BrokenDisk(admin)
                disk.break_it()
                with pytest.raises(BrokerRefusesWrites, match="MISCONF") as caught:
                    client.submit(SMALL, vae="sd", job_id="later")
                assert caught.value.job_id == "later"
                assert "disk" in caught.value.message
                running.gate.open()
                wait_until(lambda: running.worker._leases._behind.is_set(), what="the worker to notice")
                assert job.status() is JobStatus.PROCESSING
                disk.mend()
                ended = job.wait(60)
                assert (ended.status, ended.error_count, ended.attempts) == (JobStatus.SUCCEEDED, 0, 1)
                assert client.submit(SMALL, vae="sd", job_id="later").wait(60).status is JobStatus.SUCCEEDED
