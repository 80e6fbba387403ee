"""Answers that take their time: event streams and large bodies. Both end when the client stops reading."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import hdrs, web

from broker_config.errors import GatewayBusy, LatentqError, RateLimited
from producer.gateway.identity import Identity
from producer.gateway.settings import GatewaySettings

_RETRY_S: Final = 5.0
#: Written at a time; the client must take each piece within `patience_s`.
_PIECE_BYTES: Final = 256 * 1024
#: Silence after which proxies close a connection is 30 s and more.
HEARTBEAT_S: Final = 10.0


class StreamGate:
    """Says whether another event stream may begin."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self.open: Counter[str] = Counter()

    @contextlib.contextmanager
    def admitted(self, identity: Identity) -> Iterator[None]:
        """Room for a stream, for as long as the block lasts.

        Raises:
            GatewayBusy: too many streams are open.
            RateLimited: this key has too many open.
        """
        settings = self._settings
        if self.open.total() >= settings.max_streams:
            raise GatewayBusy(f"{settings.max_streams} event streams are open: poll instead", retry_after_s=_RETRY_S)
        if identity.key is not None and self.open[identity.name] >= settings.max_streams_per_key:
            raise RateLimited(
                f"this key has {settings.max_streams_per_key} event streams open: close some, or poll",
                retry_after_s=_RETRY_S,
            )
        self.open[identity.name] += 1
        try:
            yield
        finally:
            self.open[identity.name] -= 1
            if not self.open[identity.name]:
                del self.open[identity.name]


class EventStream:
    """Server-sent events of one connection: begins and ends with an `async with` block.

    Once it has begun there is no other way to say that something went wrong than to end, so an error of the broker in
    the block ends it; browsers ask again by themselves.
    """

    def __init__(self, request: web.Request, *, patience_s: float) -> None:
        self._request = request
        self._patience_s = patience_s
        #: What the handler returns.
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )

    async def __aenter__(self) -> Self:
        await self.response.prepare(self._request)
        await self._write(b"retry: 2000\n\n")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or isinstance(error, LatentqError):
            await self.response.write_eof()
            return True
        if isinstance(error, TimeoutError):
            raise ConnectionResetError("the client stopped reading") from None
        return False

    async def send(self, event: str, text: str) -> None:
        """One event; `text` is JSON without line breaks."""
        await self._write(f"event: {event}\ndata: {text}\n\n".encode())

    async def beat(self) -> None:
        """A comment, so that nobody thinks the connection dead."""
        await self._write(b": still here\n\n")

    async def _write(self, data: bytes) -> None:
        async with asyncio.timeout(self._patience_s):
            await self.response.write(data)


async def send_bytes(
    request: web.Request,
    data: bytes | memoryview,
    *,
    headers: Mapping[str, str],
    patience_s: float,
    status: int = 200,
) -> web.StreamResponse:
    """A body of known length, piece by piece; a client that stops reading is cut off."""
    response = web.StreamResponse(status=status, headers=headers)
    response.content_length = len(data)
    await response.prepare(request)
    # aiohttp sends a streamed body after HEAD, too, which would be read as the next answer.
    view = memoryview(b"" if request.method == hdrs.METH_HEAD else data)
    try:
        for start in range(0, len(view), _PIECE_BYTES):
            async with asyncio.timeout(patience_s):
                await response.write(view[start : start + _PIECE_BYTES])
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client stopped reading") from None
    await response.write_eof()
    return response


async def send_head(request: web.Request, size: int, *, headers: Mapping[str, str]) -> web.StreamResponse:
    """What GET would answer, without its body."""
    response = web.StreamResponse(headers=headers)
    response.content_length = size
    await response.prepare(request)
    await response.write_eof()
    return response


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A schema model, as JSON."""
    return web.Response(
        status=status, body=body.model_dump_json().encode(), content_type="application/json", headers=headers
    )
