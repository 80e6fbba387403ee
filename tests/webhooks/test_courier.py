"""The courier and the outbox together: leases, isolation, rotation, progress, what is forgotten, what is given up."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable

import pytest
from aiohttp import web
from pydantic import SecretStr

from broker_config import keys
from broker_config.connection import Connections
from broker_config.receiver_url import ReceiverUrl
from broker_config.settings import Settings
from broker_config.webhook_deliveries import DeliveryState, WebhookDeliveries, delivery_id
from broker_config.webhook_outbox import Attempt, DueDelivery, Settled, WebhookOutbox
from broker_config.webhook_secrets import WebhookSecrets
from broker_config.webhooks import GIVE_UP_S, WebhookEvent
from producer import DecodeClient, JobHandle
from tests.support.faulty_proxy import FaultyProxy
from tests.support.receivers import OTHER_SECRET, SECRET, Clock, CourierThread, Receiver, ok, status
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until
from tests.webhooks.conftest import LATENTS
from worker.janitor import Janitor

End = Callable[..., JobHandle]
FAILED = Attempt(at_ms=1, status=500, duration_ms=1, error="not 2xx")


@pytest.fixture
def outbox(connections: Connections, settings: Settings, clock: Clock) -> WebhookOutbox:
    """The courier's side, without a courier."""
    return WebhookOutbox(connections, settings, ahead_s=lambda: clock.ahead_s)


@pytest.fixture
def claim(outbox: WebhookOutbox) -> Callable[..., list[DueDelivery]]:
    """Claims as a courier would."""

    def call(token: str, *, courier: str = "c", most: int = 64, most_per_receiver: int = 8) -> list[DueDelivery]:
        return outbox.claim(
            token=token, courier=courier, lease_s=60, most=most, most_per_receiver=most_per_receiver, alive_s=10
        )

    return call


Claim = Callable[..., list[DueDelivery]]


# Leases ------------------------------------------------------------------------------------------------------


def test_a_claim_that_is_sent_again_gets_the_same_and_one_that_comes_late_gets_nothing(
    ended: End, claim: Claim
) -> None:
    job = ended("https://hooks.example/1")
    assert [due.job_id for due in claim("one")] == [job.id]
    assert [due.job_id for due in claim("one")] == [job.id]
    assert claim("two") == []
    ended("https://hooks.example/1")
    assert claim("one") == []
    assert len(claim("three")) == 1


def test_a_lease_that_ended_lets_another_courier_send_it_under_the_same_id_and_what_the_first_says_is_not_heard(
    ended: End, claim: Claim, clock: Clock, outbox: WebhookOutbox, deliveries: WebhookDeliveries
) -> None:
    ended("https://hooks.example/1")
    (first,) = claim("one")
    assert claim("two", courier="d") == []
    clock.advance(61)
    (second,) = claim("three", courier="d")
    assert second.id == first.id
    assert outbox.settle(first, FAILED, word="delivered", answered=True) is Settled.LOST
    assert outbox.settle(second, FAILED, word="failed", pause_s=5, answered=True) is Settled.AGAIN
    assert outbox.settle(second, FAILED, word="failed", pause_s=5, answered=True) is Settled.ALREADY
    assert len(deliveries.show(first.id).attempts) == 1


def test_two_couriers_share_what_one_receiver_may_have(ended: End, claim: Claim) -> None:
    for _ in range(5):
        ended("https://hooks.example/1")
    assert len(claim("one", most_per_receiver=3)) == 3
    assert claim("two", courier="d", most_per_receiver=3) == []
    other = ended("https://friend.example/1")
    assert [due.job_id for due in claim("three", courier="d", most_per_receiver=3)] == [other.id]


# Isolation ---------------------------------------------------------------------------------------------------


def test_a_receiver_that_hangs_holds_up_nobody_else_and_is_asked_ever_less(
    ended: End, receiver: Receiver, courier: CourierThread, clock: Clock, deliveries: WebhookDeliveries
) -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    with Receiver(never) as hanging:
        stuck = [ended(hanging.url) for _ in range(30)]
        free = [ended(receiver.url) for _ in range(30)]

        def state(job: JobHandle) -> DeliveryState:
            return deliveries.of_job(job.id)[0].state

        wait_until(lambda: all(state(job) is DeliveryState.DELIVERED for job in free), what="the others")
        breaker = keys.breaker(hanging.url.removesuffix("/hook"))
        client = deliveries._connections.commands
        wait_until(lambda: client.hget(breaker, "open_ms"), what="five silences")
        # Eight at first, then two at a time until the fifth silence: never all thirty.
        asked = len(hanging.received)
        assert 5 <= asked <= 12
        hanging.answer = ok
        clock.advance(10 * 60)
        wait_until(lambda: all(state(job) is DeliveryState.DELIVERED for job in stuck), what="the ones that were stuck")
        assert len({request.id for request in hanging.received}) == 30
    assert client.exists(breaker) == 0


# What is sent --------------------------------------------------------------------------------------------------


def test_during_a_rotation_each_secret_verifies(
    ended: End, receiver: Receiver, courier: CourierThread, connections: Connections
) -> None:
    secrets = WebhookSecrets(connections)
    secrets.add("default", SECRET)
    secrets.add("default", OTHER_SECRET)
    ended(receiver.url, webhook_secret=None)
    wait_until(lambda: receiver.received, what="the message")
    (request,) = receiver.received
    assert request.verified(SECRET) == request.verified(OTHER_SECRET)
    assert len(request.headers["webhook-signature"].split()) == 2


def test_every_event_that_was_asked_for_arrives_with_the_state_it_is_of(
    client: DecodeClient, worker: StoreWorker, receiver: Receiver, courier: CourierThread
) -> None:
    events = ["queued", "processing", "progress", "failed"]
    job = client.submit(LATENTS, vae="sd", webhook=receiver.url, webhook_events=events, webhook_secret=SECRET)
    claim = worker.claim_one()
    worker.renew(claim, stage="device", done=3, total=4)
    worker.fail(claim)
    wait_until(lambda: len(receiver.received) == 4, what="four messages")
    messages = {request.id: request.verified(SECRET) for request in receiver.received}
    assert {name: (message["type"], message["data"]["status"]) for name, message in messages.items()} == {
        f"msg_{job.id}_queued": ("job.queued", "queued"),
        f"msg_{job.id}_processing": ("job.processing", "processing"),
        f"msg_{job.id}_progress_3": ("job.progress", "processing"),
        f"msg_{job.id}_failed": ("job.failed", "failed"),
    }
    assert messages[f"msg_{job.id}_progress_3"]["data"]["progress"] == {"done": 3, "total": 4}
    assert messages[f"msg_{job.id}_failed"]["data"]["errors"][0]["code"] == "decode_failed"


@pytest.mark.parametrize("gone", ["acknowledged", "forgotten"])
def test_an_end_is_told_although_its_job_is_gone_by_then(
    gone: str, ended: End, receiver: Receiver, clock: Clock, settings: Settings, connections: Connections
) -> None:
    job = ended(receiver.url)
    if gone == "acknowledged":
        job.ack()
    else:
        connections.commands.delete(keys.job(job.id))
    with CourierThread(settings, clock=clock):
        wait_until(lambda: receiver.received, what="the message")
    data = receiver.received[0].verified(SECRET)["data"]
    assert (data["id"], data["status"], data["outputs"]) == (job.id, "succeeded", [])


def test_a_ping_says_what_came_back_and_is_sent_once(
    receiver: Receiver, courier: CourierThread, deliveries: WebhookDeliveries, connections: Connections
) -> None:
    WebhookSecrets(connections).add("default", SECRET)

    def outcome_of_ping() -> DeliveryState:
        ping = deliveries.ping(ReceiverUrl.parse(receiver.url), signer="default")
        wait_until(lambda: deliveries.show(ping).attempts, what="the answer")
        assert receiver.received[-1].id == ping
        assert receiver.received[-1].verified(SECRET)["type"] == "ping"
        return deliveries.show(ping).state

    assert outcome_of_ping() is DeliveryState.DELIVERED
    receiver.answer = status(410)
    assert outcome_of_ping() is DeliveryState.DROPPED
    assert deliveries.stopped() == {}  # a ping asks; it does not stop anything
    assert len(receiver.received) == 2


def test_an_artifact_that_is_lost_is_linked_and_the_message_goes_out(
    ended: End, receiver: Receiver, clock: Clock, settings: Settings, connections: Connections
) -> None:
    job = ended(receiver.url, webhook_inline=True)
    kept = ended(receiver.url, webhook_inline=True)
    result = job.snapshot().result
    assert result is not None
    connections.commands.delete(keys.blob(result.artifacts[0].blob.name))
    with CourierThread(settings, clock=clock):
        wait_until(lambda: len(receiver.received) == 2, what="both messages")
    outputs = {data["id"]: data["outputs"][0] for data in (item.verified(SECRET)["data"] for item in receiver.received)}
    assert base64.b64decode(outputs[kept.id]["inline"]) == b"picture"
    assert "inline" not in outputs[job.id]
    assert outputs[job.id]["url"].startswith("https://queue.example/")


# Outages -----------------------------------------------------------------------------------------------------


def test_a_broker_that_is_away_is_waited_out_and_does_not_keep_a_courier_from_stopping(
    ended: End, receiver: Receiver, settings: Settings, broker_url: str, deliveries: WebhookDeliveries
) -> None:
    with FaultyProxy(broker_url) as proxy:
        far = settings.model_copy(update={"redis_url": SecretStr(proxy.url)})
        with CourierThread(far):
            wait_until(lambda: deliveries.counts().couriers, what="the courier")
            with proxy.refused():
                job = ended(receiver.url)
                assert deliveries.of_job(job.id)[0].state is DeliveryState.PENDING
            wait_until(lambda: deliveries.of_job(job.id)[0].state is DeliveryState.DELIVERED, what="the delivery")
        courier = CourierThread(far)
        courier.__enter__()
        with proxy.refused():
            stopping = time.monotonic()
            courier.__exit__(None, None, None)
        assert time.monotonic() - stopping < 20


# What is given up ------------------------------------------------------------------------------------------------


def test_what_no_courier_came_for_in_time_is_a_dead_letter_and_can_be_sent_again(
    ended: End, claim: Claim, client: DecodeClient, clock: Clock, outbox: WebhookOutbox, deliveries: WebhookDeliveries
) -> None:
    job = ended("https://hooks.example/1")
    janitor = Janitor(client.store, name="test", outbox=outbox)
    clock.advance(GIVE_UP_S - 60)
    janitor.tick()
    name = delivery_id(job.id, WebhookEvent.SUCCEEDED)
    assert deliveries.show(name).state is DeliveryState.PENDING
    clock.advance(120)
    janitor.tick()
    assert (deliveries.show(name).state, deliveries.show(name).reason) == (
        DeliveryState.DEAD,
        "no courier came by in time",
    )
    assert claim("one") == []
    assert deliveries.redeliver(name)
    assert not deliveries.redeliver(name)
    assert [due.id for due in claim("two")] == [name]


def test_only_so_many_dead_letters_are_kept_the_last_ones(
    ended: End, claim: Claim, connections: Connections, settings: Settings, clock: Clock, deliveries: WebhookDeliveries
) -> None:
    tight = settings.model_copy(update={"webhook_max_pending": 2})
    few = WebhookOutbox(connections, tight, ahead_s=lambda: clock.ahead_s)
    jobs = [ended("https://hooks.example/1") for _ in range(3)]
    for due in sorted(claim("one"), key=lambda due: [job.id for job in jobs].index(due.job_id)):
        assert few.settle(due, FAILED, word="failed", answered=True) is Settled.DEAD
        clock.advance(0.001)  # equal times are in the order of their names
    page = deliveries.page("dead", limit=1)
    rest = deliveries.page("dead", limit=1, after=page.cursor)
    assert [item.job_id for item in (*page.deliveries, *rest.deliveries)] == [jobs[2].id, jobs[1].id]
    assert rest.cursor is None
