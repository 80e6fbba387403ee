"""Stopping, cancelling and outages: nothing is lost, nothing is done that was called off."""

from __future__ import annotations

import numpy as np
import redis
from pydantic import SecretStr
from rq.command import send_shutdown_command, send_stop_job_command
from rq.serializers import JSONSerializer

from broker_config import keys
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.settings import Settings
from producer import DecodeClient, JobHandle, JobStatus
from tests.support.faulty_proxy import FaultyProxy
from tests.support.thread_worker import ThreadWorker, stage_threads
from tests.support.wait import wait_until


def submit(client: DecodeClient, **options: object) -> JobHandle:
    return client.submit(np.ones((1, 4, 8, 8), dtype=np.float32), vae="sd", **options)  # type: ignore[arg-type]


def wait_for_listener(client: DecodeClient, name: str) -> None:
    """RQ's commands go over pub/sub: who does not listen yet misses them."""
    channel = f"rq:pubsub:{name}"
    wait_until(lambda: client.store.connections.commands.pubsub_numsub(channel)[0][1], what="its listener")


def test_stopping_finishes_what_the_device_holds_and_hands_the_prefetched_back(
    client: DecodeClient, settings: Settings
) -> None:
    jobs = [submit(client) for _ in range(4)]
    with ThreadWorker(settings) as running:
        running.gate.close()
        assert running.gate.reached.wait(60)
        wait_until(lambda: jobs[1].status() is JobStatus.PROCESSING, what="the next job to be fetched")
        running.worker.stop()
        running.gate.open()
        assert running.stop() == 0
    states = [job.status() for job in jobs]
    assert states[0] is JobStatus.SUCCEEDED
    assert states[1:] == [JobStatus.QUEUED] * 3
    assert jobs[1].snapshot().attempts == 0  # handed back unmarked
    queue = client.store.connections.commands.lrange(keys.rq_queue(keys.queue_name("sd", "normal")), 0, -1)
    assert [item.decode() for item in queue if isinstance(item, bytes)] == [job.id for job in jobs[1:]]


def test_rqs_shutdown_command_stops_the_worker(client: DecodeClient, settings: Settings) -> None:
    with ThreadWorker(settings, name="told-by-rq") as running:
        wait_until(lambda: client.store.served({"sd"}), what="the worker")
        wait_for_listener(client, "told-by-rq")
        send_shutdown_command(client.store.connections.commands, "told-by-rq")
        running._thread.join(60)
        assert running.status == 0


def test_a_running_job_is_canceled_between_two_stages(client: DecodeClient, settings: Settings) -> None:
    job = submit(client)
    with ThreadWorker(settings) as running:
        running.gate.close()
        assert running.gate.reached.wait(60)
        assert job.cancel() is JobStatus.PROCESSING
        wait_until(lambda: running.worker._leases.is_canceled(running.worker._leases.held()[0]), what="the renewal")
        running.gate.open()
        assert job.wait(60).status is JobStatus.CANCELED


def test_rqs_stop_job_cancels_a_running_job(client: DecodeClient, settings: Settings) -> None:
    job = submit(client)
    with ThreadWorker(settings, name="stop-job") as running:
        running.gate.close()
        assert running.gate.reached.wait(60)
        wait_for_listener(client, "stop-job")
        send_stop_job_command(client.store.connections.commands, job.id, serializer=JSONSerializer)
        wait_until(lambda: running.worker._leases.is_canceled(running.worker._leases.held()[0]), what="the command")
        running.gate.open()
        assert job.wait(60).status is JobStatus.CANCELED


def test_a_worker_cut_off_from_the_broker_keeps_what_it_decoded_and_completes(
    client: DecodeClient, settings: Settings, broker_server: EmbeddedBroker
) -> None:
    """The broker is away for longer than a lease, in the middle of a decode and of its completion."""
    with FaultyProxy(broker_server.url) as proxy:
        far = settings.model_copy(update={"redis_url": SecretStr(proxy.url)})
        job = submit(client)
        with ThreadWorker(far) as running:
            running.gate.close()
            assert running.gate.reached.wait(60)
            with proxy.refused():
                running.gate.open()
                lease_over = settings.lease_s * 1000
                started = client.store.now_ms()
                wait_until(lambda: client.store.now_ms() - started > lease_over, what="the lease to end")
                assert client.store.reap("janitor", quiet_s=3600).jobs == {}  # the first look starts a grace period
                client.store.connections.commands.hset(keys.REAPER, "grace_ms", 0)
                assert client.store.reap("janitor", quiet_s=3600).jobs == {job.id: "crashed"}
                assert job.status() is JobStatus.QUEUED
            assert job.wait(60).status is JobStatus.SUCCEEDED
            assert len(running.gate.calls) == 1  # decoded once: the result was kept through the outage
        snapshot = job.snapshot()
        assert (snapshot.attempts, snapshot.crash_count) == (1, 0)


def test_a_worker_idle_through_an_outage_takes_the_next_job(
    client: DecodeClient, settings: Settings, broker_server: EmbeddedBroker
) -> None:
    with FaultyProxy(broker_server.url) as proxy:
        far = settings.model_copy(update={"redis_url": SecretStr(proxy.url)})
        with ThreadWorker(far):
            wait_until(lambda: client.store.served({"sd"}), what="the worker")
            with proxy.refused():
                job = submit(client)
                wait_until(lambda: not client.store.served({"sd"}), what="the worker to be missed")
            assert job.wait(60).status is JobStatus.SUCCEEDED


def test_an_idle_worker_is_woken_and_needs_no_poll(client: DecodeClient, settings: Settings) -> None:
    """Nine of ten jobs start within 10 ms of their submit on an idle machine; here only that no poll is waited for."""
    with ThreadWorker(settings):
        submit(client).wait(60)
        waits = []
        for _ in range(10):
            snapshot = submit(client).wait(60)
            waits.append(snapshot.started_ms - snapshot.submitted_ms)
    assert sorted(waits)[5] < 500  # the poll behind the doorbell comes once a second


def test_rq_sees_the_worker_come_work_and_leave(client: DecodeClient, settings: Settings) -> None:
    admin: redis.Redis = client.store.connections.commands
    with ThreadWorker(settings, name="seen-by-rq") as running:
        job = submit(client)
        running.gate.close()
        running.gate.reached.wait(60)
        key = "rq:worker:seen-by-rq"
        wait_until(lambda: admin.hget(key, "state") == b"busy", what="RQ to show it busy")
        running.gate.open()
        job.wait(60)
        wait_until(lambda: admin.hget(key, "state") == b"idle", what="RQ to show it idle")
    assert admin.smembers("rq:workers") == set()
    assert stage_threads() == []
