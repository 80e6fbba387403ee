"""Bodies on their way in: read without blocking, bounded in number, bytes and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Final

from aiohttp import BodyPartReader, ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from broker_config.errors import BadRequest, BodyTooLarge, GatewayBusy, LengthRequired, UploadTooSlow
from producer.gateway.settings import GatewaySettings

#: What a multipart part is read in: its boundary is looked for in each piece.
_PART_BYTES: Final = 256 * 1024
_BUSY_RETRY_S: Final = 2.0
#: What aiohttp raises of a body that breaks off or is not what it says; its multipart reader also asserts.
MALFORMED: Final = (ClientError, HttpProcessingError, ConnectionError, ValueError, AssertionError, RuntimeError)


class UploadGate:
    """Says whether another body may be read now."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self.count = 0
        self.size_bytes = 0

    @contextlib.contextmanager
    def admitted(self, size_bytes: int) -> Iterator[None]:
        """Room for a body of this size, for as long as the block lasts.

        Raises:
            GatewayBusy: too many, or too large ones, are being read.
        """
        settings = self._settings
        too_many = self.count >= settings.max_uploads
        if too_many or (self.count and self.size_bytes + size_bytes > settings.max_uploads_bytes):
            raise self._busy()
        self.count += 1
        self.size_bytes += size_bytes
        try:
            yield
        finally:
            self.count -= 1
            self.size_bytes -= size_bytes

    @contextlib.contextmanager
    def enlarged(self, size_bytes: int) -> Iterator[None]:
        """Room for what a body that was admitted unpacks to, for as long as the block lasts.

        Raises:
            GatewayBusy: with the others it is too much.
        """
        if self.count > 1 and self.size_bytes + size_bytes > self._settings.max_uploads_bytes:
            raise self._busy()
        self.size_bytes += size_bytes
        try:
            yield
        finally:
            self.size_bytes -= size_bytes

    def _busy(self) -> GatewayBusy:
        return GatewayBusy(
            f"{self.count} bodies of {self.size_bytes} bytes are being read, which is as much as may be at a time",
            retry_after_s=_BUSY_RETRY_S,
        )


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


class Incoming:
    """Bytes as they arrive."""

    def __init__(self, chunks: AsyncIterator[bytes], *, deadline: float) -> None:
        """Args:
        chunks: the bytes.
        deadline: loop time at which the client has been too slow.
        """
        self._chunks = chunks
        self._deadline = deadline
        self._rest = memoryview(b"")

    async def exactly(self, size: int) -> bytearray:
        """The next `size` bytes, fewer if there are no more."""
        data = bytearray(size)
        filled = 0
        while filled < size:
            if not self._rest:
                self._rest = memoryview(await self._next())
                if not self._rest:
                    return data[:filled]
            taken = min(size - filled, len(self._rest))
            data[filled : filled + taken] = self._rest[:taken]
            self._rest = self._rest[taken:]
            filled += taken
        return data

    async def ends(self) -> bool:
        """Whether nothing more comes."""
        if not self._rest:
            self._rest = memoryview(await self._next())
        return not self._rest

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout_at(self._deadline):
                async for chunk in self._chunks:
                    if chunk:
                        return chunk
                return b""
        except TimeoutError:
            raise UploadTooSlow() from None
        except MALFORMED as error:
            raise BadRequest(f"the body broke off or is malformed ({type(error).__name__})") from None


def deadline_for(size_bytes: int, settings: GatewaySettings) -> float:
    """Loop time by which a body of this size must be here."""
    loop = asyncio.get_running_loop()
    return loop.time() + settings.patience_s + size_bytes / settings.min_upload_bytes_per_s


def body_of(request: web.Request, *, deadline: float) -> Incoming:
    """The request's body."""
    return Incoming(request.content.iter_any().__aiter__(), deadline=deadline)


def part_of(part: BodyPartReader, *, deadline: float) -> Incoming:
    """One part of a multipart body."""

    async def chunks() -> AsyncIterator[bytes]:
        while not part.at_eof():
            yield await part.read_chunk(_PART_BYTES)

    return Incoming(chunks(), deadline=deadline)


async def small_body(request: web.Request, settings: GatewaySettings) -> bytes:
    """A body of JSON, whole.

    Raises:
        BodyTooLarge, LengthRequired, UploadTooSlow, BadRequest: it does not come as it should.
    """
    length = length_of(request, most=settings.max_form_bytes)
    return bytes(await body_of(request, deadline=deadline_for(length, settings)).exactly(length))
