"""Connections to the gateway: so many at a time, and none is held by a client that does not take what it asked for.

DESIGN. aiohttp's own timer closes a connection on which no request comes, or no next one. It does not bound writing:
an answer waits in the transport for a client that reads nothing, also after the connection was closed, and counts
all the time. So each connection has a timer of its own while bytes wait: it begins when the transport asks to pause, or
when the connection is closed with something left, and ends it at once. What aiohttp would answer in words of its own,
before there is a request, is a problem document here.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from broker_config.errors import BadRequest, InternalError
from producer.gateway.context import GATEWAY
from producer.gateway.error_responses import problem_response
from producer.gateway.middlewares import set_safe_headers
from producer.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

#: The client must take as much within `patience_s`.
_PIECE_BYTES: Final = 256 * 1024


class Connection(web.RequestHandler):
    """One connection."""

    __slots__ = ("_closing", "_cut", "_listener", "_opened")

    def __init__(self, listener: Listener, **options: Any) -> None:
        super().__init__(listener, **options)
        self._listener = listener
        #: aiohttp forgets its own transport when it closes it.
        self._opened: asyncio.Transport | None = None
        self._cut: asyncio.TimerHandle | None = None
        self._closing = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._opened = self.transport
        if not self._listener.has_room_for(self) and self._opened is not None:
            self._opened.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._opened = None
        self._let_be()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._closing:
            self._let_be()

    def force_close(self) -> None:
        super().force_close()
        self._ends()

    async def start(self) -> None:
        try:
            await super().start()
        finally:
            self._ends()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no request, or broke where nobody looks any more. What was sent is not repeated."""
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer broke off") from exc
        if status == 400:
            logger.info(
                "what %s sent is no request (%s)",
                request.remote,
                type(exc).__name__,
                extra={"action": "request_unreadable"},
            )
            what = "a line of its head is too long" if isinstance(exc, LineTooLong) else "it is not as HTTP/1.1 has it"
            response = problem_response(BadRequest(f"the request cannot be read: {what}"), request)
        else:
            logger.error("a request broke", exc_info=exc, extra={"action": "request_broke"})
            response = problem_response(InternalError(), request)
        set_safe_headers(response)
        response.force_close()
        return response

    # Inside ---------------------------------------------------------------------------------------------

    def _ends(self) -> None:
        self._closing = True
        self._listener.live.discard(self)
        if self._opened is not None and self._opened.get_write_buffer_size() > 0:
            self._cut_later()

    def _cut_later(self) -> None:
        if self._cut is None and self._opened is not None:
            pieces = 1 + self._opened.get_write_buffer_size() // _PIECE_BYTES
            self._cut = self._loop.call_later(pieces * self._listener.own.patience_s, self._opened.abort)

    def _let_be(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None


class Listener(web.Server):
    """Makes the connections, and knows those that are open."""

    def __init__(self, made: web.Server, own: GatewaySettings) -> None:
        """Args:
        made: what aiohttp would listen with.
        own: how long, and how many.
        """
        super().__init__(made.request_handler, request_factory=made.request_factory, **made._kwargs)
        self._answer = made.request_handler
        self.request_handler = self._handled
        self.own = own
        #: Connections that are not being closed.
        self.live: set[Connection] = set()

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)

    @property
    def held(self) -> int:
        """Connections, those that are being closed included."""
        return len(self._connections)

    def has_room_for(self, connection: Connection) -> bool:
        """Whether there may be one more; if so, it counts from now on."""
        if len(self.live) >= self.own.max_connections:
            return False
        self.live.add(connection)
        return True

    async def _handled(self, request: web.BaseRequest) -> web.StreamResponse:
        """What aiohttp refuses before it asks our middlewares (Expect) looks as all refusals do."""
        try:
            return await self._answer(request)
        except web.HTTPException as error:
            response = problem_response(BadRequest(f"the request cannot be served: {error.reason}"), request)
            response.force_close()
            return response


class Runner(web.AppRunner):
    """Runs an application on such connections."""

    __slots__ = ("_own",)

    def __init__(self, app: web.Application, own: GatewaySettings, **options: Any) -> None:
        super().__init__(app, **options)
        self._own = own

    async def _make_server(self) -> web.Server:
        listener = Listener(await super()._make_server(), self._own)
        self.app[GATEWAY].metrics.connections.set_function(lambda: listener.held)
        return listener
