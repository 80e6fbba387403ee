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
import time
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from broker_config.errors import BadRequest, LinkInvalid, NotAllowed, NotAuthenticated, WrongHost
from broker_config.link_signing import EXPIRES, SIGNATURE
from producer.gateway.api_keys import Scope
from producer.gateway.context import Gateway
from producer.gateway.identity import LINK, LOCAL, Identity
from producer.gateway.reach import Reach
from producer.gateway.sessions import COOKIE

CSRF_HEADER: Final = "X-CSRF-Token"
#: A look at a key or a session is a round trip or two, for each stream.
_READMIT_S: Final = 3.0
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
#: Set by proxies, as are those that begin with X-Forwarded-: then "from this machine" says nothing.
_PROXY_HEADERS: Final = frozenset(
    {"forwarded", "via", "x-real-ip", "x-client-ip", "cf-connecting-ip", "true-client-ip"}
)


def check_origin(request: web.Request, reach: Reach, *, linked: bool = False) -> None:
    """Refuses what is addressed to someone else, or sent by another site's page.

    Args:
        request: what is asked.
        reach: our names.
        linked: it brings a signed link. That is what lets it in, no cookie and no address, so a page may show it.

    Raises:
        BadRequest: not one Host header, or a target with another host.
        WrongHost: a name that is not ours.
        NotAllowed: another site's page sent it.
    """
    hosts = request.headers.getall("Host", ())
    if len(hosts) != 1:
        raise BadRequest(f"the request has {len(hosts)} Host headers, expected one")
    target = request.raw_path
    if (
        not target.startswith(("/", "*")) and _netloc(target) != hosts[0].lower()
    ):  # it counts, not Host (RFC 9112, 3.2.2)
        raise BadRequest("the request's target and its Host header name two hosts")
    host = _hostname(hosts[0])
    if not _is_ours(host, reach):
        raise WrongHost(
            f"{host[:80]!r} is not a name of this gateway: add it to LATENTQ_GATEWAY_ALLOWED_HOSTS if it is"
        )
    foreign = request.headers.get("Sec-Fetch-Site", "none") in ("cross-site", "same-site")
    if foreign and not linked and not _is_navigation(request):
        raise NotAllowed("another site's page sent this request")
    origin = request.headers.get("Origin")
    if request.method in _SAFE or origin is None:
        return
    if _netloc(origin) != hosts[0].lower() and origin != reach.public_url:
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
            request.headers.get(CSRF_HEADER, "").encode(errors="replace"), session.csrf.encode()
        ):
            raise NotAllowed(f"a session must send its {CSRF_HEADER}, which GET /session says")
        return Identity(key=session.key, via="session", csrf=session.csrf)
    if gateway.reach.needs_key or _came_by_proxy(request):
        raise NotAuthenticated()
    return LOCAL


class Readmittance:
    """Asks again, now and then, who it is that has watched for long: a key may be revoked, a session may end."""

    def __init__(self, request: web.Request, gateway: Gateway, identity: Identity) -> None:
        self._request = request
        self._gateway = gateway
        self._identity = identity
        self._next = time.monotonic() + _READMIT_S

    async def check(self) -> None:
        """Raises `NotAuthenticated` or `NotAllowed` if it would not be let in any more."""
        if time.monotonic() < self._next:
            return
        found = await identify(self._request, self._gateway)
        found.require(Scope.READ)
        if found.name != self._identity.name:
            raise NotAuthenticated()
        self._next = time.monotonic() + _READMIT_S


def identify_link(request: web.Request, gateway: Gateway) -> Identity:
    """Who has a signed link: nobody we know, who may read this one thing. No key and no cookie is looked at.

    Raises:
        LinkInvalid, LinkExpired: the link does not open it.
    """
    query = request.query
    if gateway.links is None or any(len(query.getall(name, ())) != 1 for name in (EXPIRES, SIGNATURE)):
        raise LinkInvalid()
    gateway.links.check(request.path, expires=query[EXPIRES], signature=query[SIGNATURE])
    return LINK


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


def _came_by_proxy(request: web.Request) -> bool:
    return any(name.lower() in _PROXY_HEADERS or name.lower().startswith("x-forwarded-") for name in request.headers)


def _netloc(url: str) -> str:
    """Host and port of a URL or an origin; empty: it is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def _hostname(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    name, _, port = header.rpartition(":")
    return (name if name and port.isdigit() else header).lower().rstrip(".")


def _is_ours(host: str, reach: Reach) -> bool:
    if host in reach.names:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or not reach.is_loopback


def _is_navigation(request: web.Request) -> bool:
    """A link to us on another page is no harm: its page cannot read what it leads to."""
    return request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"
