"""How much is in memory for clients at a time: so many bodies, so many bytes, and of both a share for one key."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Final

from broker_config.errors import GatewayBusy, RateLimited
from producer.gateway.identity import Identity

_RETRY_S: Final = 2.0


class ByteGate:
    """Says whether there is room for another body. Not thread-safe: call it from the loop."""

    def __init__(self, doing: str, *, most: int, most_bytes: int, share: float) -> None:
        """Args:
        doing: what happens to the bodies, for messages.
        most: bodies at a time.
        most_bytes: bytes of all of them. One that is larger is let in alone.
        share: part of both that one key may have.
        """
        self._doing = doing
        self._most = most
        self._most_bytes = most_bytes
        self._share = share
        self._count_of: Counter[str] = Counter()
        self._bytes_of: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Bodies that are in."""
        return self._count_of.total()

    @property
    def size_bytes(self) -> int:
        """Their bytes."""
        return self._bytes_of.total()

    @contextlib.contextmanager
    def admitted(self, identity: Identity, size_bytes: int) -> Iterator[None]:
        """Room for a body of this size, for as long as the block lasts.

        Raises:
            GatewayBusy: too many, or too large ones, are in.
            RateLimited: so are this key's.
        """
        self._check(identity, size_bytes, others=self.count, own=self._count_of[identity.name], more=1)
        with self._held(identity, 1, size_bytes):
            yield

    @contextlib.contextmanager
    def enlarged(self, identity: Identity, size_bytes: int) -> Iterator[None]:
        """Room for what a body that was admitted unpacks to, for as long as the block lasts. Raises as `admitted`."""
        self._check(identity, size_bytes, others=self.count - 1, own=self._count_of[identity.name] - 1, more=0)
        with self._held(identity, 0, size_bytes):
            yield

    def _check(self, identity: Identity, size_bytes: int, *, others: int, own: int, more: int) -> None:
        """`others`, `own`: bodies besides this one, of all and of this key."""
        name = identity.name
        if others and (self.count + more > self._most or self.size_bytes + size_bytes > self._most_bytes):
            raise GatewayBusy(
                f"{self.count} bodies of {self.size_bytes} bytes are being {self._doing}, which is as much as may be "
                "at a time",
                retry_after_s=_RETRY_S,
            )
        if identity.via == "none" or not own:
            return
        too_many = self._count_of[name] + more > self._share * self._most
        if too_many or self._bytes_of[name] + size_bytes > self._share * self._most_bytes:
            raise RateLimited(
                f"{self._count_of[name]} bodies of {self._bytes_of[name]} bytes of this client are being "
                f"{self._doing}, which is as much as one may have at a time",
                retry_after_s=_RETRY_S,
            )

    @contextlib.contextmanager
    def _held(self, identity: Identity, count: int, size_bytes: int) -> Iterator[None]:
        name = identity.name
        self._count_of[name] += count
        self._bytes_of[name] += size_bytes
        try:
            yield
        finally:
            self._count_of[name] -= count
            self._bytes_of[name] -= size_bytes
            if not self._count_of[name]:
                del self._count_of[name], self._bytes_of[name]
