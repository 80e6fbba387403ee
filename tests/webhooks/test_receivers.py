"""What becomes of a delivery, by receiver: down, slow, refusing, redirecting, gone, broken, talkative, lying."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from broker_config.settings import Settings
from broker_config.webhook_deliveries import Delivery, DeliveryState, WebhookDeliveries, delivery_id
from broker_config.webhooks import SCHEDULE_S, WebhookEvent
from producer import JobHandle
from tests.support.fake_resolver import FakeResolver
from tests.support.receivers import SECRET, Clock, CourierThread, Receiver, ok, status
from tests.support.wait import wait_until

End = Callable[..., JobHandle]


@pytest.fixture
def settled(deliveries: WebhookDeliveries) -> Callable[..., Delivery]:
    """Waits until a job's delivery has had so many attempts, and is in the courier's hands no more."""

    def wait(job: JobHandle, *, attempts: int = 1) -> Delivery:
        found: list[Delivery] = []

        def there() -> bool:
            found[:] = [deliveries.show(delivery_id(job.id, WebhookEvent.SUCCEEDED))]
            return len(found[0].attempts) >= attempts and found[0].state is not DeliveryState.SENDING

        wait_until(there, timeout_s=20, what=f"attempt {attempts}")
        assert len(found[0].attempts) == attempts
        return found[0]

    return wait


def test_a_receiver_that_answers_2xx_gets_the_job_once_signed_with_links(
    ended: End, receiver: Receiver, courier: CourierThread, settled: Callable[..., Delivery]
) -> None:
    job = ended(receiver.url + "?to=me")
    delivery = settled(job)
    assert (delivery.state, delivery.attempts[0].status) == (DeliveryState.DELIVERED, 204)
    (request,) = receiver.received
    message = request.verified(SECRET)
    assert request.path == "/hook?to=me"
    assert request.headers["content-type"] == "application/json"
    assert request.id == f"msg_{job.id}_succeeded"
    assert set(message) == {"type", "timestamp", "data"}
    assert message["type"] == "job.succeeded"
    assert (message["data"]["id"], message["data"]["status"]) == (job.id, "succeeded")
    (output,) = message["data"]["outputs"]
    assert output["url"].startswith(f"https://queue.example/v1/decodes/{job.id}/output/0?expires=")
    assert output["content_type"] == "image/png"
    assert message["data"]["urls"]["self"] == f"https://queue.example/v1/decodes/{job.id}"


def test_one_that_is_down_is_tried_on_the_whole_schedule_under_one_id_and_then_a_dead_letter(
    ended: End,
    clock: Clock,
    courier: CourierThread,
    deliveries: WebhookDeliveries,
    settled: Callable[..., Delivery],
) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused, and nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        job = ended(f"http://127.0.0.1:{taken.getsockname()[1]}/hook")
        for number, pause_s in enumerate(SCHEDULE_S[1:], start=1):
            delivery = settled(job, attempts=number)
            assert delivery.state is DeliveryState.PENDING
            assert delivery.due_ms - delivery.attempts[-1].at_ms == pytest.approx(pause_s * 1000, abs=1000)
            clock.advance(pause_s + 1)
        delivery = settled(job, attempts=len(SCHEDULE_S))
    assert delivery.state is DeliveryState.DEAD
    assert {attempt.status for attempt in delivery.attempts} == {None}
    assert {attempt.error for attempt in delivery.attempts} == {"not reachable (Connection refused)"}
    assert [item.id for item in deliveries.page("dead").deliveries] == [delivery.id]
    assert deliveries.counts().pending == 0


def test_one_that_is_slow_is_given_up_after_the_timeout_and_tried_again(
    ended: End, receiver: Receiver, clock: Clock, courier: CourierThread, settled: Callable[..., Delivery]
) -> None:
    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    receiver.answer = never
    job = ended(receiver.url)
    delivery = settled(job)
    assert (delivery.attempts[0].status, delivery.attempts[0].error) == (None, "no whole answer within 0.5 s")
    assert 500 <= delivery.attempts[0].duration_ms < 5000
    receiver.answer = ok
    clock.advance(6)
    assert settled(job, attempts=2).state is DeliveryState.DELIVERED
    assert len({request.id for request in receiver.received}) == 1


@pytest.mark.parametrize(
    ("answer", "pause_s"),
    [
        pytest.param(status(500), 5, id="500"),
        pytest.param(status(404), 5, id="404"),
        pytest.param(status(429, Retry_After="120"), 120, id="429, Retry-After in seconds"),
        pytest.param(status(429, Retry_After="86400"), 3600, id="429, Retry-After above an hour"),
        pytest.param(status(503, Retry_After="soon"), 5, id="503, Retry-After that is none"),
        pytest.param(status(503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), 5, id="503, Retry-After in the past"),
    ],
)
def test_one_that_refuses_is_tried_again_when_it_says_or_the_schedule_says(
    answer: Callable[..., object], pause_s: float, ended: End, receiver: Receiver, clock: Clock,
    courier: CourierThread, settled: Callable[..., Delivery],
) -> None:  # fmt: skip
    receiver.answer = answer  # type: ignore[assignment]
    job = ended(receiver.url)
    delivery = settled(job)
    assert delivery.state is DeliveryState.PENDING
    assert delivery.due_ms - delivery.attempts[0].at_ms == pytest.approx(pause_s * 1000, abs=1000)
    receiver.answer = ok
    clock.advance(pause_s + 1)
    assert settled(job, attempts=2).state is DeliveryState.DELIVERED
    first, second = receiver.received
    assert first.id == second.id
    assert first.verified(SECRET) == second.verified(SECRET)


def test_one_that_redirects_has_failed_and_is_not_followed(
    ended: End, receiver: Receiver, courier: CourierThread, settled: Callable[..., Delivery]
) -> None:
    with Receiver() as elsewhere:
        receiver.answer = status(302, Location=elsewhere.url)
        attempt = settled(ended(receiver.url)).attempts[0]
        assert (attempt.status, attempt.error) == (302, "a redirect, which is not followed")
        assert elsewhere.received == []


def test_one_that_is_gone_is_left_alone_until_it_is_enabled_again(
    ended: End,
    receiver: Receiver,
    courier: CourierThread,
    deliveries: WebhookDeliveries,
    settled: Callable[..., Delivery],
) -> None:
    receiver.answer = status(410)
    first = settled(ended(receiver.url + "?first"))
    assert (first.state, first.attempts[0].status) == (DeliveryState.DEAD, 410)
    receiver.answer = ok

    second = ended(receiver.url + "?second")  # the query is no part of the endpoint
    other = settled(ended(receiver.url + "-2"))
    assert other.state is DeliveryState.DELIVERED
    unasked = settled(second, attempts=0)
    assert unasked.state is DeliveryState.DEAD
    assert "410" in unasked.reason
    assert list(deliveries.stopped()) == [receiver.url]
    assert [request.path for request in receiver.received] == ["/hook?first", "/hook-2"]

    assert deliveries.enable(receiver.url)
    assert not deliveries.enable(receiver.url)
    assert deliveries.redeliver(first.id)
    assert deliveries.redeliver(unasked.id)
    assert settled(second).state is DeliveryState.DELIVERED
    wait_until(lambda: deliveries.show(first.id).state is DeliveryState.DELIVERED, what="the first one")
    assert deliveries.page("dead").deliveries == ()


def test_one_that_closes_in_the_middle_of_its_answer_has_failed(
    ended: End, receiver: Receiver, courier: CourierThread, settled: Callable[..., Delivery]
) -> None:
    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=200, headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"0123456789")
        assert request.transport is not None
        request.transport.close()
        return response

    receiver.answer = break_off
    delivery = settled(ended(receiver.url))
    assert delivery.state is DeliveryState.PENDING
    assert delivery.attempts[0].status == 200
    assert delivery.attempts[0].error == "it closed the connection before its answer was whole"


def test_one_that_sends_ten_megabytes_is_believed_and_not_listened_to(
    ended: End, receiver: Receiver, courier: CourierThread, settled: Callable[..., Delivery]
) -> None:
    sent = 0

    async def talk(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(status=200, headers={"Content-Length": str(10_000_000)})
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b"s3cr3t-of-ours".ljust(10_000))
            sent += 10_000
        return response

    receiver.answer = talk
    delivery = settled(ended(receiver.url))
    assert delivery.state is DeliveryState.DELIVERED
    assert sent < 10_000_000  # the connection was closed on it; kernel buffers took what it could write before
    assert "s3cr3t" not in repr(delivery)


def test_names_that_nobody_answers_for_keep_no_other_name_from_being_looked_up(
    ended: End,
    receiver: Receiver,
    clock: Clock,
    settings: Settings,
    settled: Callable[..., Delivery],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lookup cannot be broken off: its thread is gone for as long as the resolver waits."""
    answer, let_go, asked = socket.getaddrinfo, threading.Event(), threading.Semaphore(0)

    def look_up(host: str, *args: Any, **options: Any) -> Any:
        if host.endswith(".stuck.example"):
            asked.release()
            assert let_go.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return answer("127.0.0.1" if host == "friend.example" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    allow = (f"http://friend.example:{receiver.port}", "http://*.stuck.example:*")
    try:
        with CourierThread(settings.model_copy(update={"webhook_allow": allow}), clock=clock):
            stuck = 40  # asyncio's own threads are 32 at most
            for number in range(stuck):
                ended(f"http://host-{number}.stuck.example:8080/hook")
            for _ in range(stuck):
                assert asked.acquire(timeout=60)
            friend = settled(ended(f"http://friend.example:{receiver.port}/hook"))
            assert (friend.state, len(friend.attempts)) == (DeliveryState.DELIVERED, 1)
            let_go.set()
    finally:
        let_go.set()


def test_a_name_that_resolves_to_an_address_inside_is_not_connected_to(
    ended: End, receiver: Receiver, clock: Clock, settings: Settings, settled: Callable[..., Delivery]
) -> None:
    resolver = FakeResolver({"hooks.example": [["127.0.0.1"]], "friend.example": [["127.0.0.1"]]})
    allowed = settings.model_copy(
        update={"webhook_ports": (443, receiver.port), "webhook_allow": (f"http://friend.example:{receiver.port}",)}
    )
    with CourierThread(allowed, clock=clock, resolver=resolver):
        lying = settled(ended(f"https://hooks.example:{receiver.port}/hook"))
        assert lying.state is DeliveryState.PENDING
        assert (lying.attempts[0].status, lying.attempts[0].error) == (None, "webhook_address_refused")
        literal = settled(ended(receiver.url))  # allowed where it was submitted, not where it is delivered
        assert literal.attempts[0].error == "webhook_url_refused"
        assert receiver.received == []
        friend = settled(ended(f"http://friend.example:{receiver.port}/hook"))
    assert friend.state is DeliveryState.DELIVERED
    assert resolver.asked == {"hooks.example": 1, "friend.example": 1}
