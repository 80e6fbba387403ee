"""Connections to receivers of webhooks: every one is judged by the address it really goes to.

DESIGN. A resolver that checks is not enough: aiohttp asks none for IP literals, and a name can resolve to another
address a moment later. `socket_factory` is called with the address of each attempt, after resolving and before
connecting, so the check stands there. It must know for which URL the attempt is (an allow-listed name is trusted,
another name that resolves to the same address is not), and aiohttp does not tell it: `connect`, which every request
goes through, also every hop of a redirect and every use of a kept connection, leaves the URL in a context variable.
Happy-eyeballs attempts run in tasks, which copy the context; an attempt without it is refused.

A session for webhooks must be made by `guarded_session` and used through `guarded_post`: proxies from the environment,
redirects, cookies and decompression are off, each of which would lead around the check or hold what a receiver chose.
"""

from __future__ import annotations

import errno
import socket
import ssl
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from broker_config.errors import WebhookAddressRefused, WebhookUrlRefused
from broker_config.receiver_url import ReceiverUrl
from broker_config.url_guard import UrlGuard

if TYPE_CHECKING:
    from aiohttp.client import ClientTimeout, _RequestContextManager
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import AddrInfoType, Connection
    from aiohttp.tracing import Trace

__all__ = ["GuardedConnector", "guarded_post", "guarded_session"]

#: A delivery ends after this, whatever the receiver does: connect, send, status line and what is read of the answer.
TIMEOUT_S: Final = 15.0
#: Connections at a time, and of these to one host, so that a slow one cannot take them all.
CONNECTIONS: Final = 64
CONNECTIONS_PER_HOST: Final = 4


@dataclass(slots=True)
class _Call:
    """What a connection is for, and whether an address was refused to it."""

    url: ReceiverUrl
    refusals: list[WebhookAddressRefused] = field(default_factory=list)


_call: ContextVar[_Call | None] = ContextVar("latentq-webhook-call", default=None)


class GuardedConnector(aiohttp.TCPConnector):
    """Connects to where the guard allows, and nowhere else.

    Raises, from requests of its sessions:
        WebhookUrlRefused: the URL may not be called.
        WebhookAddressRefused: the address that its host leads to may not be called.
    """

    def __init__(self, guard: UrlGuard, **options: Any) -> None:
        """Args:
        guard: what is allowed.
        options: of `aiohttp.TCPConnector`, such as `resolver` and `ssl`.
        """
        super().__init__(socket_factory=self._open_socket, **options)
        self._guard = guard

    async def connect(  # aiohttp names its parameters
        self,
        req: ClientRequest,
        traces: list[Trace],
        timeout: ClientTimeout,  # noqa: ASYNC109
    ) -> Connection:
        """A connection for a request, from the pool or new."""
        if req.proxy is not None:
            raise WebhookUrlRefused("webhooks go through no proxy, which would connect in our place", field="webhook")
        call = _Call(self._guard.check_url(str(req.url)))
        token = _call.set(call)
        try:
            return await super().connect(req, traces, timeout)
        except aiohttp.ClientConnectorError as error:
            if call.refusals:
                raise call.refusals[0] from error
            raise
        finally:
            _call.reset(token)

    def _open_socket(self, address: AddrInfoType) -> socket.socket:
        """A socket for one attempt; `address` is a row of `getaddrinfo`."""
        family, kind, protocol, _, where = address
        call = _call.get()
        if call is None or family not in (socket.AF_INET, socket.AF_INET6):
            raise PermissionError(errno.EACCES, "not a connection of a webhook")
        try:
            self._guard.check_address(str(where[0]), call.url)
        except WebhookAddressRefused as refusal:
            call.refusals.append(refusal)
            # An OSError makes aiohttp go on to the name's next address.
            raise PermissionError(errno.EACCES, refusal.message) from refusal
        return socket.socket(family, kind, protocol)


def guarded_session(
    guard: UrlGuard,
    *,
    resolver: AbstractResolver | None = None,
    ssl_context: ssl.SSLContext | None = None,
    timeout_s: float = TIMEOUT_S,
    connections: int = CONNECTIONS,
    connections_per_host: int = CONNECTIONS_PER_HOST,
) -> aiohttp.ClientSession:
    """A session whose requests go only where `guard` allows. Call it in the loop that it will run in; close it.

    Args:
        guard: what is allowed.
        resolver: resolves names; the system's by default. The session does not close one that it was given.
        ssl_context: verifies certificates; the system's authorities by default.
        timeout_s: longest time of one request.
        connections: most at a time.
        connections_per_host: most at a time to one host and port.
    """
    connector = GuardedConnector(
        guard,
        resolver=resolver,
        ssl=ssl_context or True,
        limit=connections,
        limit_per_host=connections_per_host,
    )
    return aiohttp.ClientSession(
        connector=connector,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        headers={"User-Agent": "latentq-courier"},
    )


def guarded_post(
    session: aiohttp.ClientSession, url: ReceiverUrl, *, body: bytes, headers: dict[str, str]
) -> _RequestContextManager:
    """POST without following redirects; an `async with` block around it has the answer. Read little of it."""
    return session.post(URL(str(url), encoded=True), data=body, headers=headers, allow_redirects=False)
