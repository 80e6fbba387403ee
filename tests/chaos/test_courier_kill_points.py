"""A courier is SIGKILLed before and after each thing it says to the broker about a delivery; it arrives all the same.

The steps are what one delivery costs, in order: claim, read the job, read the secrets, settle. `before`: the command
was sent and never arrived. `after`: the broker executed it, the courier never knew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr

from broker_config import keys
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.settings import Settings
from broker_config.webhook_deliveries import DeliveryState, WebhookDeliveries
from producer import DecodeClient, JobHandle
from tests.chaos.crew import Member
from tests.chaos.test_kill_points import digest_of
from tests.support.faulty_proxy import FaultyProxy
from tests.support.processes import environment_of
from tests.support.receivers import SECRET, Receiver, with_webhooks
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

_numbers = itertools.count()
STEPS = ("claim", "read the job", "read the secrets", "settle")
#: How a delivery stands when its courier dies; else it is being sent.
HELD_IN = {("claim", "before"): DeliveryState.PENDING, ("settle", "after"): DeliveryState.DELIVERED}
POINTS = [(step, when) for step in STEPS for when in ("before", "after")]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return with_webhooks(settings)


@pytest.fixture
def courier_at(
    settings: Settings, broker_server: EmbeddedBroker, tmp_path: Path
) -> Iterator[tuple[FaultyProxy, Member]]:
    """A courier that reaches the broker through a proxy, and what the next one in its place will be."""
    with FaultyProxy(broker_server.url) as proxy:
        environment = environment_of(settings.model_copy(update={"redis_url": SecretStr(proxy.url)}))
        environment |= {"LATENTQ_COURIER_TIMEOUT_S": "1", "LATENTQ_COURIER_LEASE_S": "2"}
        member = Member(kind="courier", number=next(_numbers), environment=environment, log=tmp_path / "courier.log")
        member.start()
        yield proxy, member
        proxy.reset()
        member.end()


@pytest.mark.parametrize(("step", "when"), POINTS, ids=[f"{when} {step}" for step, when in POINTS])
def test_a_courier_killed_here_loses_no_delivery_and_keeps_its_id(
    step: str, when: str, client: DecodeClient, settings: Settings, courier_at: tuple[FaultyProxy, Member]
) -> None:
    proxy, member = courier_at
    deliveries = WebhookDeliveries(client.store.connections, settings)
    wait_until(lambda: deliveries.counts().couriers, timeout_s=60, what="the courier")
    worker = StoreWorker(client.store)
    name = f"killed-{when}-{STEPS.index(step)}"
    command, argument = {
        "claim": ("EVALSHA", digest_of("deliver")),
        "read the job": ("HGETALL", keys.job(name).encode()),
        "read the secrets": ("HGETALL", keys.webhook_secret(f"job:{name}").encode()),
        "settle": ("EVALSHA", digest_of("settle")),
    }[step]

    with Receiver() as receiver:

        def ended(job_id: str) -> JobHandle:
            latents = np.zeros((1, 4, 8, 8), np.float32)
            job = client.submit(latents, vae="sd", job_id=job_id, webhook=receiver.url, webhook_secret=SECRET)
            worker.succeed(worker.claim_one())
            return job

        def delivered(job: JobHandle) -> bool:
            return [item.state for item in deliveries.of_job(job.id)] == [DeliveryState.DELIVERED]

        undisturbed = ended("undisturbed")  # and the scripts are known from here on
        wait_until(lambda: delivered(undisturbed), timeout_s=20, what="the first delivery")
        hold = proxy.hold if when == "before" else proxy.hold_reply
        # It looks all the time: one look is held, whose answer was "nothing", until there is something to be found.
        idle = proxy.hold_reply(command="EVALSHA", argument=digest_of("deliver"))
        idle.wait()
        rule = hold(command=command, argument=argument)
        job = ended(name)
        idle.release()
        rule.wait()
        assert deliveries.of_job(name)[0].state is HELD_IN.get((step, when), DeliveryState.SENDING)
        member.kill()
        rule.release()
        member.start()
        wait_until(lambda: delivered(job), timeout_s=60, what=f"the delivery whose courier died {when} {step}")
        (delivery,) = deliveries.of_job(job.id)
        requests = [request for request in receiver.received if request.id == delivery.id]
        assert 1 <= len(requests) <= 2
        assert {request.verified(SECRET)["data"]["id"] for request in requests} == {job.id}
        assert {request.id for request in receiver.received} == {f"msg_{undisturbed.id}_succeeded", delivery.id}
    assert deliveries.counts().pending == 0
