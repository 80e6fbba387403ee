"""Bodies on their way in: read without blocking, bounded in bytes and time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final, TypeVar

from aiohttp import BodyPartReader, ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from broker_config.errors import BadRequest, BodyTooLarge, LengthRequired, UploadTooSlow
from producer.gateway.settings import GatewaySettings

T = TypeVar("T")

#: What a multipart part is read in: its boundary is looked for in each piece.
_PART_BYTES: Final = 256 * 1024
#: What aiohttp raises of a body that breaks off or is not what it says; its multipart reader also asserts.
MALFORMED: Final = (ClientError, HttpProcessingError, ConnectionError, ValueError, AssertionError, RuntimeError)


def length_of(request: web.Request, *, most: int) -> int:
    """How long the body says it is.

    Raises:
        LengthRequired: it does not.
        BodyTooLarge: longer than `most`.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise BadRequest("the body is compressed: send it as it is, latents do not shrink")
    length = request.content_length
    if length is None:
        if request.body_exists:
            raise LengthRequired()
        return 0
    if length > most:
        raise BodyTooLarge(f"the body has {length} bytes, at most {most} are taken")
    return length


class Pace:
    """How long a client may still take for one body.

    Only the time in which it is waited for counts, not that in which the gateway works on what came; and what it may
    take grows with what it sent, so a body that is announced and does not come holds nothing for longer than
    `patience_s`.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        self._patience_s = settings.patience_s
        self._bytes_per_s = settings.min_upload_bytes_per_s
        self._received_bytes = 0
        self._waited_s = 0.0

    async def wait(self, read: Awaitable[T]) -> T:
        """What `read` gives, in time.

        Raises:
            UploadTooSlow: not in time.
            BadRequest: the body broke off, or is not what it says.
            StopAsyncIteration: as `read`.
        """
        left_s = self._patience_s + self._received_bytes / self._bytes_per_s - self._waited_s
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(min(self._patience_s, left_s)):
                return await read
        except TimeoutError:
            raise UploadTooSlow() from None
        except MALFORMED as error:
            raise BadRequest(f"the body broke off or is malformed ({type(error).__name__})") from None
        finally:
            self._waited_s += loop.time() - began

    def came(self, size_bytes: int) -> None:
        """Counts bytes."""
        self._received_bytes += size_bytes


class Incoming:
    """Bytes as they arrive. They are kept as the pieces they came in: nothing is allocated for what is only said."""

    def __init__(self, chunks: AsyncIterator[bytes], pace: Pace) -> None:
        self._chunks = chunks
        self._pace = pace
        self._rest = b""

    async def pieces(self, size: int) -> list[bytes]:
        """The next `size` bytes, fewer if there are no more."""
        found: list[bytes] = []
        while size > 0 and await self._more():
            taken, self._rest = self._rest[:size], self._rest[size:]
            size -= len(taken)
            found.append(taken)
        return found

    async def exactly(self, size: int) -> bytes:
        """The same in one piece, for what is small."""
        return b"".join(await self.pieces(size))

    async def ends(self) -> bool:
        """Whether nothing more comes."""
        return not await self._more()

    async def drop(self) -> None:
        """Reads what is left, to the void."""
        while await self._more():
            self._rest = b""

    async def _more(self) -> bool:
        while not self._rest:
            try:
                self._rest = await self._pace.wait(anext(self._chunks))
            except StopAsyncIteration:
                return False
            self._pace.came(len(self._rest))
        return True


def joined(pieces: list[bytes]) -> bytes:
    """Pieces as one, which takes their place. Slow for large ones: call it in a thread, others run meanwhile."""
    if len(pieces) != 1:
        pieces[:] = [b"".join(pieces)]
    return pieces[0]


def body_of(request: web.Request, settings: GatewaySettings) -> Incoming:
    """The request's body."""
    return Incoming(request.content.iter_any().__aiter__(), Pace(settings))


def part_of(part: BodyPartReader, pace: Pace) -> Incoming:
    """One part of a multipart body."""

    async def chunks() -> AsyncIterator[bytes]:
        while not part.at_eof():
            yield await part.read_chunk(_PART_BYTES)

    return Incoming(chunks(), pace)


async def small_json(request: web.Request, settings: GatewaySettings, *, default: Any = None) -> Any:
    """A body of JSON, read; `default` if there is none.

    Raises:
        BadRequest: it is not JSON; further as `small_body`.
    """
    text = await small_body(request, settings)
    try:
        return json.loads(text.decode()) if text else default
    except (ValueError, RecursionError):
        raise BadRequest("the body is not JSON") from None


async def small_body(request: web.Request, settings: GatewaySettings) -> bytes:
    """A body of JSON, whole.

    Raises:
        BodyTooLarge, LengthRequired, UploadTooSlow, BadRequest: it does not come as it should.
    """
    length = length_of(request, most=settings.max_form_bytes)
    return await body_of(request, settings).exactly(length)
