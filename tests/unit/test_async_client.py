"""The asynchronous client is the blocking one's twin; its waits are woken and cost no thread each."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from broker_config.connection import connect_url
from broker_config.errors import JobCanceled, JobNotFound, QueueFull, UnknownVae, WaitTimeout
from broker_config.job_store import JobStore
from broker_config.settings import Settings, load_settings
from producer import AsyncDecodeClient, AsyncJobHandle, DecodeClient, JobHandle
from tests.support.faulty_proxy import FaultyProxy
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until_async

LATENTS = np.zeros((1, 4, 2, 2), dtype=np.float32)
#: A wake-up takes milliseconds; looking again takes ten seconds. Between them lies what a busy machine may need.
SOON_S = 8.0

#: What the twin has besides: where its calls run, and what wakes it.
_OWN = {"run", "transfer"}
#: Steps of the blocking client that the twin uses, not for callers.
_STEPS = {"attempt", "encode_attempt", "redecode_attempt", "taken", "read"}


@pytest.fixture
def own_settings(broker_url: str) -> Settings:
    return load_settings(redis_url=broker_url, _env_file=None)


@pytest.fixture
def worker(broker_url: str, own_settings: Settings) -> Iterator[StoreWorker]:
    connections = connect_url(broker_url, name="latentq-test-worker")
    yield StoreWorker(JobStore(connections, own_settings))
    connections.close()


@asynccontextmanager
async def client_of(settings: Settings, url: str | None = None) -> AsyncIterator[AsyncDecodeClient]:
    assert settings.redis_url is not None
    connections = connect_url(url or settings.redis_url.get_secret_value(), name="latentq-test")
    async with AsyncDecodeClient(connections, settings=settings) as client:
        yield client


def public(kind: type) -> dict[str, Callable[..., Any]]:
    return {
        name: value
        for name, value in inspect.getmembers(kind, callable)
        if not name.startswith("_") and name not in _OWN | _STEPS
    }


@pytest.mark.parametrize(("blocking", "twin"), [(DecodeClient, AsyncDecodeClient), (JobHandle, AsyncJobHandle)])
def test_the_two_clients_have_the_same_calls_with_the_same_arguments(blocking: type, twin: type) -> None:
    assert set(public(blocking)) == set(public(twin))
    for name, call in public(blocking).items():
        arguments = [(item.name, item.kind, item.default) for item in inspect.signature(call).parameters.values()]
        others = inspect.signature(public(twin)[name]).parameters.values()
        assert [(item.name, item.kind, item.default) for item in others] == arguments, name


def test_what_asks_the_broker_is_awaited_and_nothing_else() -> None:
    plain = {"job", "from_env", "from_url"}
    for kind in (AsyncDecodeClient, AsyncJobHandle):
        for name, call in public(kind).items():
            awaited = inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)
            assert awaited == (name not in plain), name


def test_a_job_goes_from_submit_to_its_result(own_settings: Settings, worker: StoreWorker) -> None:
    async def story() -> None:
        async with client_of(own_settings) as client:
            await client.ping()
            job = await client.submit(LATENTS, vae="sd", job_id="mine", output="png")
            assert await job.status() == "queued"
            assert (await client.submit(LATENTS, vae="sd", job_id="mine", output="png")).id == "mine"
            waiting = asyncio.create_task(job.wait())
            claim = await asyncio.to_thread(worker.claim_one)
            assert await asyncio.to_thread(worker.succeed, claim) == "completed"
            snapshot = await asyncio.wait_for(waiting, SOON_S)
            assert snapshot.status == "succeeded"
            ((artifact, data),) = await job.artifacts()
            assert data == b"picture"
            assert (await job.result()).artifacts == (artifact,)
            again = await job.redecode(output="webp")
            request = (await again.snapshot()).request
            assert request is not None
            assert (request.output, request.source_job_id) == ("webp", "mine")
            assert await again.cancel() == "canceled"
            with pytest.raises(JobCanceled):
                await again.result()
            await again.ack()
            assert await again.status() == "expired"

    asyncio.run(story())


def test_errors_are_the_blocking_clients(own_settings: Settings) -> None:
    async def story() -> None:
        async with client_of(own_settings) as client:
            with pytest.raises(UnknownVae):
                await client.submit(LATENTS, vae="nobody")
            with pytest.raises(JobNotFound):
                await client.job("nobody").wait(timeout=5)
            job = await client.submit(LATENTS, vae="sd")
            with pytest.raises(WaitTimeout):
                await job.wait(timeout=0.05)

    asyncio.run(story())


def test_a_full_queue_is_waited_for_without_a_thread(own_settings: Settings, worker: StoreWorker) -> None:
    narrow = own_settings.model_copy(update={"max_pending_jobs": 1})

    async def story() -> None:
        async with client_of(narrow) as client:
            await client.submit(LATENTS, vae="sd", job_id="first")
            with pytest.raises(QueueFull):
                await client.submit(LATENTS, vae="sd", job_id="second")
            second = asyncio.create_task(client.submit(LATENTS, vae="sd", job_id="second", block_s=60))
            await asyncio.to_thread(lambda: worker.succeed(worker.claim_one()))
            assert (await asyncio.wait_for(second, 30)).id == "second"

    asyncio.run(story())


def test_five_hundred_waits_take_one_thread_and_each_is_woken(own_settings: Settings) -> None:
    async def story() -> None:
        before = set(threading.enumerate())
        async with client_of(own_settings) as client:
            jobs = [await client.submit(LATENTS, vae="sd", job_id=f"job-{number}") for number in range(500)]
            waits = [asyncio.create_task(job.wait()) for job in jobs]
            await wait_until_async(lambda: len(client.feed._watches) == 500, what="all waits to hang on the feed")
            ours = [thread.name.partition("_")[0] for thread in set(threading.enumerate()) - before]
            assert set(ours) <= {"commands", "transfers", "ended-feed"}
            assert ours.count("ended-feed") == 1
            assert len(ours) < 20  # the two pools are bounded, however many wait
            for job in jobs:
                await job.cancel()
            done = await asyncio.wait_for(asyncio.gather(*waits), 60)
            assert {item.status for item in done} == {"canceled"}
            assert client.feed._watches == {}

    asyncio.run(story())


def test_jobs_come_as_they_end(own_settings: Settings) -> None:
    async def story() -> None:
        async with client_of(own_settings) as client:
            jobs = [await client.submit(LATENTS, vae="sd", job_id=name) for name in ("a", "b", "c")]
            await jobs[1].cancel()
            ended = client.as_completed(jobs, timeout=60)
            assert (await anext(ended)).id == "b"
            await jobs[2].cancel()
            assert (await asyncio.wait_for(anext(ended), SOON_S)).id == "c"
            await jobs[0].cancel()
            assert [job.id async for job in ended] == ["a"]

    asyncio.run(story())


def test_what_ends_while_the_subscription_is_cut_is_found(own_settings: Settings, broker_url: str) -> None:
    async def story() -> None:
        with FaultyProxy(broker_url) as proxy, DecodeClient.from_url(broker_url) as other:
            async with client_of(own_settings, proxy.url) as client:
                jobs = [await client.submit(LATENTS, vae="sd", job_id=name) for name in ("first", "second")]
                waits = [asyncio.create_task(job.wait()) for job in jobs]
                await wait_until_async(lambda: client.feed.look_every_s > 5, what="the feed to listen")
                with proxy.refused():
                    await asyncio.to_thread(other.job("first").cancel)
                assert (await asyncio.wait_for(waits[0], 30)).status == "canceled"
                await asyncio.to_thread(other.job("second").cancel)
                assert (await asyncio.wait_for(waits[1], 30)).status == "canceled"

    asyncio.run(story())
