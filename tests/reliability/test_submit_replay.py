"""Submit is safe to repeat after any of its commands, and a replay changes nothing, ever.

Small latents travel with the job, in one script. Large ones: admission is asked, they are stored under a provisional
lifetime, and the job takes them over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from broker_config import keys
from broker_config.blob_store import RedisBlobStore
from broker_config.connection import connect_url
from broker_config.errors import BrokerUnreachable, JobConflict
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.settings import Settings
from producer import DecodeClient
from tests.support.broker_contents import assert_same, everything
from tests.support.faulty_proxy import FaultyProxy
from tests.support.store_worker import StoreWorker
from tests.support.submit_ways import (
    _NEW_SCRIPT,
    LARGE,
    LATENTS,
    POINTS,
    WAYS,
    Way,
    assert_accepted_once,
)
from tests.support.wait import wait_until


@pytest.fixture
def worker(broker_url: str, producer_settings: Settings) -> Iterator[StoreWorker]:
    """A worker that does nothing but talk to the broker."""
    connections = connect_url(broker_url, name="latentq-test-worker")
    yield StoreWorker(JobStore(connections, producer_settings))
    connections.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_submit_sends_the_commands_listed_here(
    way: Way, admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    job = open_client(proxy.url).submit(way.latents, vae="sd")
    assert tuple(proxy.commands) == way.commands
    assert_accepted_once(admin, job.id, way)


@pytest.mark.parametrize("fault", ["swallow_reply", "cut_before"])
@pytest.mark.parametrize(("way", "nth"), POINTS)
def test_the_drivers_own_repeats_accept_a_job_once(
    way: Way, nth: int, fault: str, admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    rule = getattr(proxy, fault)(nth=nth)
    job = open_client(proxy.url).submit(way.latents, vae="sd")
    assert rule.struck
    assert_accepted_once(admin, job.id, way)


@pytest.mark.parametrize("fault", ["swallow_reply", "cut_before"])
@pytest.mark.parametrize(("way", "nth"), POINTS)
def test_a_caller_who_repeats_with_the_errors_job_id_gets_one_job(
    way: Way, nth: int, fault: str, admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(proxy.url, retries=0)
    rule = getattr(proxy, fault)(nth=nth)
    with pytest.raises(BrokerUnreachable) as caught:
        client.submit(way.latents, vae="sd")
    assert rule.struck
    assert caught.value.job_id is not None
    job = client.submit(way.latents, vae="sd", job_id=caught.value.job_id)
    assert job.id == caught.value.job_id
    assert_accepted_once(admin, job.id, way)


def test_a_broker_that_refuses_connections_is_an_error_that_says_so_and_a_repeat_is_accepted_once(
    admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(proxy.url, retries=0)
    client.ping()
    with proxy.refused(), pytest.raises(BrokerUnreachable, match="does not answer") as caught:
        client.submit(LATENTS, vae="sd")
    job = client.submit(LATENTS, vae="sd", job_id=caught.value.job_id)
    assert_accepted_once(admin, job.id)


def _queued(worker: StoreWorker, job_id: str) -> None:
    pass


def _processing(worker: StoreWorker, job_id: str) -> None:
    worker.claim_one()


def _succeeded(worker: StoreWorker, job_id: str) -> None:
    worker.succeed(worker.claim_one())


def _failed(worker: StoreWorker, job_id: str) -> None:
    worker.fail(worker.claim_one())


def _canceled(worker: StoreWorker, job_id: str) -> None:
    worker.store.cancel(job_id)


def _expired(worker: StoreWorker, job_id: str) -> None:
    _succeeded(worker, job_id)
    worker.store.retire(job_id)


@pytest.mark.parametrize("bring_to", [_queued, _processing, _succeeded, _failed, _canceled, _expired])
def test_a_replay_at_any_time_of_a_jobs_life_returns_that_job_and_changes_nothing(
    bring_to: Callable[[StoreWorker, str], None],
    admin: redis.Redis,
    worker: StoreWorker,
    broker_url: str,
    open_client: Callable[..., DecodeClient],
) -> None:
    client = open_client(broker_url)
    job = client.submit(LATENTS, vae="sd", job_id="replayed")
    bring_to(worker, job.id)
    assert job.status().value == bring_to.__name__.strip("_")
    before = everything(admin)
    again = client.submit(LATENTS, vae="sd", job_id="replayed")
    assert again.id == job.id
    assert_same(before, everything(admin))


def test_a_replay_does_not_lengthen_a_retention_that_is_shorter_than_the_provisional_lifetime(
    admin: redis.Redis, worker: StoreWorker, broker_url: str, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(broker_url)
    client.submit(LATENTS, vae="sd", job_id="short", retention_s=60.0)
    _succeeded(worker, "short")
    before = everything(admin)
    client.submit(LATENTS, vae="sd", job_id="short", retention_s=60.0)
    assert_same(before, everything(admin))


def test_a_replay_after_the_latents_expired_but_before_the_janitor_came_stores_nothing(
    admin: redis.Redis, worker: StoreWorker, broker_url: str, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(broker_url)
    job = client.submit(LATENTS, vae="sd", job_id="over", retention_s=0.05)
    _failed(worker, "over")
    request = job.snapshot().request
    assert request is not None
    blob = keys.blob(request.latents.name)
    wait_until(lambda: not admin.exists(blob, keys.rq_job("over"), keys.rq_results("over")), what="retention to end")
    before = everything(admin)
    client.submit(LATENTS, vae="sd", job_id="over", retention_s=0.05)
    assert_same(before, everything(admin))
    assert job.status() is JobStatus.EXPIRED


@pytest.mark.parametrize("bring_to", [_queued, _processing, _succeeded, _failed, _canceled, _expired])
@pytest.mark.parametrize("other", ["latents", "options"])
def test_an_id_used_for_something_else_is_a_conflict_and_the_accepted_job_stays_as_it_is(
    other: str,
    bring_to: Callable[[StoreWorker, str], None],
    admin: redis.Redis,
    worker: StoreWorker,
    broker_url: str,
    open_client: Callable[..., DecodeClient],
) -> None:
    client = open_client(broker_url)
    client.submit(LATENTS, vae="sd", job_id="taken")
    bring_to(worker, "taken")
    before = everything(admin)
    latents, output = (LATENTS + 1, None) if other == "latents" else (LATENTS, "webp")
    with pytest.raises(JobConflict) as caught:
        client.submit(latents, vae="sd", job_id="taken", output=output)
    assert caught.value.job_id == "taken"
    assert_same(before, everything(admin))


def test_many_clients_that_submit_one_job_at_once_make_one_job(
    admin: redis.Redis, broker_url: str, open_client: Callable[..., DecodeClient]
) -> None:
    clients = [open_client(broker_url) for _ in range(8)]
    start = threading.Barrier(len(clients))
    errors: list[BaseException] = []

    def submit(client: DecodeClient) -> None:
        start.wait()
        try:
            for _ in range(5):
                client.submit(LATENTS, vae="sd", job_id="together")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=submit, args=(client,), name="submitter") for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_accepted_once(admin, "together")


def _submit_in_thread(client: DecodeClient) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def submit() -> None:
        try:
            outcome.append(client.submit(LARGE.latents, vae="sd", job_id="slow"))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=submit, name="submitter")
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("how", ["deleted", "expired"])
def test_latents_that_are_gone_before_the_job_is_accepted_are_stored_again(
    how: str, admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(proxy.url, provisional_s=900.0 if how == "deleted" else 0.5)
    second_step = proxy.hold(nth=len(LARGE.commands) - len(_NEW_SCRIPT) + 1)
    thread, outcome = _submit_in_thread(client)
    second_step.wait()
    (blob,) = admin.keys(keys.blob("*"))
    if how == "deleted":
        admin.delete(blob)
    else:
        wait_until(lambda: not admin.exists(blob), what="the provisional lifetime to end")
    second_step.release()
    thread.join()
    assert [job.id for job in outcome] == ["slow"]
    assert_accepted_once(admin, "slow", LARGE)


def test_storing_a_blob_again_neither_replaces_bytes_nor_shortens_its_life(admin: redis.Redis, broker_url: str) -> None:
    connections = connect_url(broker_url, name="latentq-test")
    long, short = (RedisBlobStore(connections, provisional_s=seconds) for seconds in (900.0, 1.0))
    long.put("once", b"first")
    short.put("once", b"second")
    connections.close()
    assert admin.get(keys.blob("once")) == b"first"
    assert 890_000 < admin.pttl(keys.blob("once")) <= 900_000
