"""A broker that is away, or full: submits go to the spool, and to the broker when it is back, with all they said."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from pydantic import SecretStr
from safetensors.numpy import save_file

from broker_config.connection import connect_url
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import BlobStoreUnavailable, BrokerUnreachable, JobNotFound, JobSpooled, QueueFull
from broker_config.messages import DecodeRequest
from broker_config.settings import Settings, load_settings
from producer import AsyncDecodeClient, DecodeClient, JobStatus
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

LATENTS = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float16)
#: Every kind of option, none at its default.
OPTIONS: dict[str, Any] = {
    "vae": "sd",
    "layout": "unpacked",
    "output": "webp",
    "mode": "exact",
    "priority": "high",
    "timeout_s": 77.0,
    "start_within_s": 3600.0,
    "retention_s": 1234.0,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
    "metadata": {"prompt": "a lighthouse, Brücke — 橋", "seed": "7"},
    "provenance": False,
    "allow_tiling": True,
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    """A broker of the test's own, which it stops and starts."""
    server = EmbeddedBroker(tmp_path / "broker", max_memory_bytes=64 * 1024 * 1024)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_settings(broker: EmbeddedBroker, tmp_path: Path) -> Settings:
    return load_settings(redis_url=broker.url, spool_dir=tmp_path / "spool", _env_file=None)


@pytest.fixture
def spooling(own_settings: Settings) -> Iterator[DecodeClient]:
    with client_of(own_settings) as opened:
        yield opened


def client_of(settings: Settings) -> DecodeClient:
    assert settings.redis_url is not None
    connections = connect_url(settings.redis_url.get_secret_value(), name="latentq-test", retries=0)
    return DecodeClient(connections, settings=settings, spool=settings.spool_dir)


def waiting_in(client: DecodeClient) -> list[str]:
    assert client.spool is not None
    return [entry.job_id for entry in client.spool.spool.entries()]


def arrived(client: DecodeClient, job_id: str) -> DecodeRequest:
    """The job's request, once the broker has it and the spool no longer."""
    wait_until(lambda: job_id not in waiting_in(client), what="the flush")
    request = client.store.snapshot(job_id).request
    assert request is not None
    return request


def test_what_was_submitted_while_the_broker_was_away_arrives_with_all_its_options(
    broker: EmbeddedBroker, spooling: DecodeClient
) -> None:
    wanted = spooling.attempt(spooling.taken(LATENTS), job_id="kept", **OPTIONS).request
    broker.stop()
    job = spooling.submit(LATENTS, job_id="kept", **OPTIONS)
    assert job.id == "kept"
    assert waiting_in(spooling) == ["kept"]
    with pytest.raises(JobSpooled, match="waits in the spool"):
        job.status()
    broker.start()
    found = arrived(spooling, "kept")
    assert found == wanted
    assert spooling.blobs.get(found.latents) == spooling.attempt(spooling.taken(LATENTS), **OPTIONS).tensor.data


def test_a_webhook_is_kept_with_the_secret_that_signs_it(broker: EmbeddedBroker, own_settings: Settings) -> None:
    secret = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
    hook: dict[str, Any] = {"vae": "sd", "webhook": "https://example.com/done", "webhook_secret": secret}
    linked = {"public_url": "https://latentq.example", "link_key": SecretStr("k" * 64)}
    with client_of(own_settings.model_copy(update=linked)) as client, redis.Redis.from_url(broker.url) as admin:
        client.submit(LATENTS, job_id="direct", **hook)
        broker.stop()
        client.submit(LATENTS, job_id="kept", **hook)
        broker.start()
        assert arrived(client, "kept").webhook == arrived(client, "direct").webhook
        signing = {key: admin.hgetall(key) for key in admin.scan_iter("latentq:webhook-secret:*")}
    assert len(signing) == 2
    first, second = (list(secrets.values()) for secrets in signing.values())
    assert first == second != []


def test_files_and_pictures_are_kept_too(broker: EmbeddedBroker, spooling: DecodeClient, tmp_path: Path) -> None:
    save_file({"latents": LATENTS}, tmp_path / "latents.safetensors")
    picture = np.random.default_rng(1).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    broker.stop()
    decode = spooling.submit_file(tmp_path / "latents.safetensors", vae="sd")
    encode = spooling.encode(picture, vae="sd", seed=5)
    broker.start()
    assert arrived(spooling, decode.id).shape == (1, 4, 8, 8)
    request = arrived(spooling, encode.id)
    assert (request.kind, request.seed, request.shape) == ("encode", 5, (1, 16, 24, 3))
    assert spooling.blobs.get(request.latents).endswith(picture.tobytes())


def test_a_wait_lasts_through_the_outage(broker: EmbeddedBroker, spooling: DecodeClient) -> None:
    broker.stop()
    jobs = [spooling.submit(LATENTS, vae="sd") for _ in range(3)]
    assert list(spooling.as_completed(jobs, timeout=0.3)) == []
    broker.start()
    for job in jobs:
        arrived(spooling, job.id)
    worker = StoreWorker(spooling.store)
    for _ in jobs:
        worker.succeed(worker.claim_one())
    ended = list(spooling.as_completed(jobs, timeout=30))
    assert sorted(job.id for job in ended) == sorted(job.id for job in jobs)
    assert all(job.status() is JobStatus.SUCCEEDED for job in jobs)


def test_while_the_broker_is_away_the_next_submit_does_not_ask_it(
    broker: EmbeddedBroker, spooling: DecodeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.stop()
    spooling.submit(LATENTS, vae="sd")
    monkeypatch.setattr(spooling.store, "submit", lambda *_: pytest.fail("the broker was asked"))
    assert spooling.spool is not None
    spooling.spool.close()  # no flush asks it either
    spooling.submit(LATENTS, vae="sd")
    assert len(waiting_in(spooling)) == 2


def test_what_a_full_queue_refuses_is_kept_after_its_time_and_comes_when_there_is_room(own_settings: Settings) -> None:
    with client_of(own_settings.model_copy(update={"max_pending_jobs": 1})) as limited:
        first = limited.submit(LATENTS, vae="sd")
        second = limited.submit(LATENTS, vae="sd", block_s=0.05)
        assert waiting_in(limited) == [second.id]
        first.cancel()
        assert arrived(limited, second.id).job_id == second.id
        assert second.status() is JobStatus.QUEUED


def test_a_job_in_the_spool_is_canceled_there_and_never_arrives(own_settings: Settings) -> None:
    with client_of(own_settings.model_copy(update={"max_pending_jobs": 1})) as limited:
        first = limited.submit(LATENTS, vae="sd")
        second, third = (limited.submit(LATENTS, vae="sd") for _ in range(2))
        assert second.cancel() is JobStatus.CANCELED
        assert waiting_in(limited) == [third.id]
        first.cancel()
        arrived(limited, third.id)
        assert limited.store.find([second.id]) == {}
        with pytest.raises(JobNotFound):
            second.cancel()


def test_a_job_that_was_handed_over_and_is_still_in_the_spool_is_canceled_in_both(own_settings: Settings) -> None:
    """As a process leaves it that was killed before it removed the file."""
    with client_of(own_settings) as client:
        assert client.spool is not None
        client.spool.close()
        attempt = client.attempt(client.taken(LATENTS), vae="sd", job_id="both")
        attempt.once()
        client.spool.spool.keep(attempt.request, attempt.tensor)
        assert client.job("both").cancel() is JobStatus.CANCELED
        assert waiting_in(client) == []
        assert client.job("both").status() is JobStatus.CANCELED


@pytest.mark.parametrize("job_id", ["*", "job-?", "[a-z]*", "/", "job", "job-1.x"])
def test_an_id_that_is_none_takes_no_other_job_out_of_the_spool(own_settings: Settings, job_id: str) -> None:
    with client_of(own_settings.model_copy(update={"max_pending_jobs": 1})) as limited:
        limited.submit(LATENTS, vae="sd")
        kept = [limited.submit(LATENTS, vae="sd", job_id=f"job-{number}").id for number in range(2)]
        with pytest.raises(JobNotFound):
            limited.job(job_id).cancel()
        assert waiting_in(limited) == kept


def test_while_the_broker_is_away_nobody_can_say_that_a_job_is_canceled(
    broker: EmbeddedBroker, spooling: DecodeClient
) -> None:
    broker.stop()
    job = spooling.submit(LATENTS, vae="sd")
    with pytest.raises(BrokerUnreachable):
        job.cancel()
    assert waiting_in(spooling) == [job.id]


def test_a_bucket_that_is_away_keeps_no_small_job_waiting(own_settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "bucket"
    apart = {"blob_store": folder.as_uri(), "blob_threshold_bytes": 4096}
    large = np.zeros((1, 4, 64, 64), np.float16)
    folder.mkdir()
    with client_of(own_settings.model_copy(update=apart)) as client:
        client.submit(large, vae="sd")  # sets the store up
        folder.rename(tmp_path / "elsewhere")
        late = client.submit(large, vae="sd")
        assert waiting_in(client) == [late.id]
        small = client.submit(LATENTS, vae="sd")
        assert waiting_in(client) == [late.id]
        assert small.status() is JobStatus.QUEUED
        # nor do small ones wait behind it that came to the spool for another reason
        assert client.spool is not None
        attempt = client.attempt(client.taken(LATENTS), vae="sd", job_id="behind")
        client.spool.spool.keep(attempt.request, attempt.tensor)
        report = client.spool.flush()
        assert isinstance(report.stopped_by, BlobStoreUnavailable)
        assert waiting_in(client) == [late.id]
        (tmp_path / "elsewhere").rename(folder)
        arrived(client, late.id)


def test_what_an_earlier_process_left_is_sent_by_the_next(broker: EmbeddedBroker, own_settings: Settings) -> None:
    broker.stop()
    with client_of(own_settings) as first:
        job = first.submit(LATENTS, vae="sd")
    broker.start()
    with client_of(own_settings) as second:
        arrived(second, job.id)
        assert second.job(job.id).status() is JobStatus.QUEUED


def test_without_a_spool_it_is_the_error_it_was(broker: EmbeddedBroker, own_settings: Settings) -> None:
    with client_of(own_settings.model_copy(update={"spool_dir": None})) as plain:
        assert plain.spool is None
        broker.stop()
        with pytest.raises(BrokerUnreachable):
            plain.submit(LATENTS, vae="sd")
    broker.start()
    limited = own_settings.model_copy(update={"spool_dir": None, "max_pending_jobs": 1})
    with client_of(limited) as plain:
        plain.submit(LATENTS, vae="sd")
        with pytest.raises(QueueFull):
            plain.submit(LATENTS, vae="sd")


def test_the_asynchronous_client_keeps_and_sends_alike(broker: EmbeddedBroker, own_settings: Settings) -> None:
    async def story() -> None:
        connections = connect_url(broker.url, name="latentq-test", retries=0)
        async with AsyncDecodeClient(connections, settings=own_settings, spool=own_settings.spool_dir) as client:
            wanted = client.blocking.attempt(client.blocking.taken(LATENTS), job_id="kept", **OPTIONS).request
            await asyncio.to_thread(broker.stop)
            jobs = [await client.submit(LATENTS, job_id="kept", **OPTIONS), await client.submit(LATENTS, vae="sd")]
            with pytest.raises(JobSpooled):
                await jobs[0].status()
            await asyncio.to_thread(broker.start)
            found = await asyncio.to_thread(arrived, client.blocking, "kept")
            assert dataclasses.replace(found, latents=wanted.latents) == wanted
            await asyncio.to_thread(arrived, client.blocking, jobs[1].id)
            worker = StoreWorker(client.store)
            for _ in jobs:
                await asyncio.to_thread(lambda: worker.succeed(worker.claim_one()))
            assert {job.id async for job in client.as_completed(jobs, timeout=30)} == {job.id for job in jobs}

    asyncio.run(story())


def test_the_asynchronous_wait_lasts_through_the_outage(broker: EmbeddedBroker, own_settings: Settings) -> None:
    async def story() -> None:
        connections = connect_url(broker.url, name="latentq-test", retries=0)
        async with AsyncDecodeClient(connections, settings=own_settings, spool=own_settings.spool_dir) as client:
            await asyncio.to_thread(broker.stop)
            job = await client.submit(LATENTS, vae="sd")
            waiting = asyncio.create_task(job.wait(60))
            await asyncio.to_thread(broker.start)
            await asyncio.to_thread(arrived, client.blocking, job.id)
            worker = StoreWorker(client.store)
            await asyncio.to_thread(lambda: worker.succeed(worker.claim_one()))
            assert (await waiting).status is JobStatus.SUCCEEDED

    asyncio.run(story())
