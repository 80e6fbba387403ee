"""Who may come in: the Host and Origin a request claims, and the key, cookie or lack of either that it brings.

DESIGN. A page of another site can make a browser send requests here, also to loopback, and DNS can make a name of
theirs lead here. So the Host header must be a name of ours (an address cannot be rebound), whatever changes something
must come from no page or from one of ours, and a session must prove with its CSRF token that it can read our answers.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from broker_config.errors import BadRequest, NotAllowed, NotAuthenticated, WrongHost
from producer.gateway.context import Gateway
from producer.gateway.identity import LOCAL, Identity
from producer.gateway.sessions import COOKIE
from producer.gateway.settings import GatewaySettings

CSRF_HEADER: Final = "X-CSRF-Token"
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
#: Set by proxies: then "from this machine" says nothing.
_PROXY_HEADERS: Final = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP")


def check_origin(request: web.Request, settings: GatewaySettings) -> None:
    """Refuses what is addressed to someone else, or sent by another site's page.

    Raises:
        BadRequest: not one Host header.
        WrongHost: a name that is not ours.
        NotAllowed: another site's page sent it.
    """
    hosts = request.headers.getall("Host", ())
    if len(hosts) != 1:
        raise BadRequest(f"the request has {len(hosts)} Host headers, expected one")
    host = _hostname(hosts[0])
    if not _is_ours(host, settings):
        raise WrongHost(
            f"{host[:80]!r} is not a name of this gateway: add it to LATENTQ_GATEWAY_ALLOWED_HOSTS if it is"
        )
    if request.headers.get("Sec-Fetch-Site", "none") in ("cross-site", "same-site") and not _is_navigation(request):
        raise NotAllowed("another site's page sent this request")
    origin = request.headers.get("Origin")
    if request.method in _SAFE or origin is None:
        return
    if urlsplit(origin).netloc.lower() != hosts[0].lower() and origin != (settings.public_url or "").rstrip("/"):
        raise NotAllowed(f"a page of {origin[:80]!r} sent this request, which is not this gateway")


async def identify(request: web.Request, gateway: Gateway) -> Identity:
    """Who sent the request.

    Raises:
        NotAuthenticated: nobody we know, where that is needed, or a key that is none.
        NotAllowed: a session without its CSRF token.
    """
    header = request.headers.get("Authorization")
    if header is not None:
        token, via = _token(header)
        key = await gateway.key_of_token(token)
        if key is None:
            raise NotAuthenticated("this key is unknown or revoked")
        return Identity(key=key, via=via)
    cookie = request.cookies.get(COOKIE)
    session = await gateway.client.run(gateway.sessions.find, cookie) if cookie else None
    if session is not None:
        if request.method not in _SAFE and not hmac.compare_digest(
            request.headers.get(CSRF_HEADER, "").encode(), session.csrf.encode()
        ):
            raise NotAllowed(f"a session must send its {CSRF_HEADER}, which GET /session says")
        return Identity(key=session.key, via="session", csrf=session.csrf)
    if gateway.own.needs_key or any(name in request.headers for name in _PROXY_HEADERS):
        raise NotAuthenticated()
    return LOCAL


def _token(header: str) -> tuple[str, str]:
    kind, _, rest = header.partition(" ")
    if kind.lower() == "bearer":
        return rest.strip(), "bearer"
    if kind.lower() == "basic":
        try:
            user, _, password = base64.b64decode(rest.strip(), validate=True).decode().partition(":")
        except (ValueError, binascii.Error):
            raise NotAuthenticated("the Authorization header is not valid") from None
        return password or user, "basic"  # http://user:KEY@host and http://KEY@host
    raise NotAuthenticated("the Authorization header is neither Bearer nor Basic")


def _hostname(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    name, _, port = header.rpartition(":")
    return (name if name and port.isdigit() else header).lower().rstrip(".")


def _is_ours(host: str, settings: GatewaySettings) -> bool:
    if host in settings.names:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or not settings.is_loopback


def _is_navigation(request: web.Request) -> bool:
    """A link to us on another page is no harm: its page cannot read what it leads to."""
    return request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"
