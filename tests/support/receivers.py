"""A receiver of webhooks that does as it is told, and a courier beside it, each in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from standardwebhooks import Webhook

from broker_config.connection import connect_url
from broker_config.job_store import JobStore
from broker_config.settings import Settings
from broker_config.url_guard import UrlGuard
from broker_config.webhook_outbox import WebhookOutbox
from tests.support.fake_resolver import FakeResolver
from worker.courier.attempt import Sender
from worker.courier.courier import Courier
from worker.courier.guarded_connector import guarded_session
from worker.courier.settings import CourierSettings, load_courier_settings

_BOUND_S = 30.0
#: A secret of 32 bytes, and another one.
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
OTHER_SECRET = "whsec_ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA="


class LoopThread:
    """Runs a coroutine in a thread of its own inside the `with` block; it is told to stop by an event."""

    def __init__(self, name: str) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name=name)
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    async def serve(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        """What runs in the thread; calls `ready` once, and returns soon after `stop`."""
        raise NotImplementedError

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self.serve(self._ready.set, self._stop)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._ready.set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(_BOUND_S), f"{self._thread.name} does not start"
        assert self._error is None, self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None
        assert self._stop is not None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_BOUND_S)
        assert not self._thread.is_alive(), f"{self._thread.name} does not stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """One request that came in whole."""

    path: str
    headers: dict[str, str]
    body: str

    @property
    def id(self) -> str:
        """Its `webhook-id`."""
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> dict[str, Any]:
        """The message, if this secret signed it (standardwebhooks raises otherwise)."""
        message: dict[str, Any] = Webhook(secret).verify(self.body, self.headers)
        return message


#: Answers a request whose body was read.
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def ok(request: web.Request) -> web.StreamResponse:
    """Takes it."""
    return web.Response(status=204)


def status(code: int, **headers: str) -> Answer:
    """Always this status."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


class Receiver(LoopThread):
    """An HTTP server on loopback that notes what comes in and answers as `answer` says."""

    def __init__(self, answer: Answer = ok) -> None:
        super().__init__("receiver")
        #: May be changed while it runs.
        self.answer = answer
        self.received: list[Received] = []
        self.port = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}/hook"

    async def serve(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        app = web.Application(client_max_size=1 << 20)
        app.router.add_route("*", "/{path:.*}", self._take)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        ready()
        await stop.wait()
        await runner.cleanup()

    async def _take(self, request: web.Request) -> web.StreamResponse:
        body = (await request.read()).decode()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(path=request.path_qs, headers=headers, body=body))
        return await self.answer(request)


@dataclass
class Clock:
    """By how much the couriers' clock is ahead of the broker's: days pass without waiting."""

    ahead_s: float = 0.0

    def advance(self, seconds: float) -> None:
        """Lets time pass."""
        self.ahead_s += seconds


@dataclass
class CourierThread(LoopThread):
    """A courier; its pauses have no jitter, and its clock can be put forward."""

    settings: Settings
    clock: Clock = field(default_factory=Clock)
    resolver: FakeResolver | None = None
    own: CourierSettings = field(
        default_factory=lambda: load_courier_settings(timeout_s=0.5, lease_s=2.0, _env_file=None)
    )

    def __post_init__(self) -> None:
        super().__init__("courier-under-test")

    async def serve(self, ready: Callable[[], None], stop: asyncio.Event) -> None:
        assert self.settings.redis_url is not None
        connections = connect_url(self.settings.redis_url.get_secret_value(), name="courier-under-test", retries=1)
        own = self.own
        async with guarded_session(
            UrlGuard.of(self.settings),
            resolver=self.resolver,
            timeout_s=own.timeout_s,
            connections=own.concurrency,
            connections_per_host=own.per_receiver,
        ) as session:
            courier = Courier(
                JobStore(connections, self.settings),
                self.settings,
                own,
                outbox=WebhookOutbox(connections, self.settings, ahead_s=lambda: self.clock.ahead_s),
                sender=Sender(session, timeout_s=own.timeout_s, max_answer_bytes=own.max_answer_bytes),
                jitter=lambda: 0.0,
            )
            ready()
            await courier.run(stop)
        connections.close()


def with_webhooks(settings: Settings) -> Settings:
    """These settings, with webhooks to loopback and to two names of the tests."""
    given = {
        "public_url": "https://queue.example",
        "link_key": "k" * 32,
        "webhook_allow": ("http://127.0.0.1:*", "https://hooks.example:*", "http://friend.example:*"),
    }
    return settings.model_validate(settings.model_dump(exclude_unset=True) | given)
