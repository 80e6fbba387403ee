"""A gateway in a thread of the test's process, on a port of its own, with the test's broker behind it."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any, Self

import requests

from broker_config.connection import connect_url
from broker_config.settings import Settings
from producer.gateway.app import build_app, serve
from producer.gateway.context import GATEWAY, Gateway
from producer.gateway.settings import GatewaySettings, load_gateway_settings

_BOUND_S = 30.0


class RunningGateway:
    """Serves inside the `with` block."""

    def __init__(self, settings: Settings, **own: Any) -> None:
        assert settings.redis_url is not None
        self.settings: GatewaySettings = load_gateway_settings(port=0, _env_file=None, **own)
        self._connections = connect_url(settings.redis_url.get_secret_value(), name="gateway-under-test", retries=1)
        self._app = build_app(self._connections, settings, self.settings)
        self._thread = threading.Thread(target=self._run, name="gateway-under-test")
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        #: Without a slash at the end; known once it runs.
        self.url = ""
        self._session = requests.Session()

    @property
    def parts(self) -> Gateway:
        """What it is made of."""
        return self._app[GATEWAY]

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Its loop."""
        assert self._loop is not None
        return self._loop

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(_BOUND_S), "the gateway does not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_BOUND_S)
        assert not self._thread.is_alive(), "the gateway does not stop"
        self._connections.close()

    def ask(self, method: str, path: str, *, key: str | None = None, **options: Any) -> requests.Response:
        """One request; `key`: a bearer token."""
        headers = dict(options.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return self._session.request(method, self.url + path, headers=headers, timeout=_BOUND_S, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        """GET."""
        return self.ask("GET", path, **options)

    def post(self, path: str, **options: Any) -> requests.Response:
        """POST."""
        return self.ask("POST", path, **options)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()

        def announce(url: str) -> None:
            self.url = url
            self._ready.set()

        await serve(self._app, self.settings, announce=announce, stop=self._stop)
