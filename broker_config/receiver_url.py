"""The URL of a webhook's receiver, read strictly and written in one form.

Whoever checks a URL and whoever connects to it must read the same host in it, or the check is worth nothing. So this
takes less than RFC 3986 allows, gives no second chance to what parsers disagree about (userinfo, fragments,
backslashes, control characters, percent signs in hosts), and hands on a URL that it wrote itself: the scheme and host
in lower case, names in ASCII (IDNA), an IP address in its usual notation whatever it came in (`0x7f.1`, `2130706433`,
`0177.0.0.1`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final, NoReturn, Self

from broker_config.errors import WebhookUrlRefused
from broker_config.public_address import Address

#: Longer URLs are not served reliably by proxies and servers in between.
MAX_URL_CHARACTERS: Final = 2048
DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_URL: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?]*)(?P<rest>.*)", re.DOTALL)
_AUTHORITY: Final = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]*)\]|(?P<host>[^\[\]:]*))(?::(?P<port>[0-9]{1,5}))?")
#: Never part of a URL unless percent-encoded: controls, space, and what some parser takes for something else.
_FORBIDDEN: Final = re.compile(r'[\x00-\x20\x7f-\x9f<>"{}|\\^`]')
_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_MAX_NAME_CHARACTERS: Final = 253


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiverUrl:
    """A URL in its one form; `str()` writes it. Never log it: path and query may hold the receiver's secrets."""

    #: `https` or `http`.
    scheme: str
    #: A name in lower-case ASCII without a dot at its end, or an address; IPv6 without brackets.
    host: str
    #: Also where the URL names none.
    port: int
    #: Begins with a slash.
    path: str = field(repr=False)
    #: With its question mark; empty if there is none.
    query: str = field(default="", repr=False)
    #: The host, if it is an IP address.
    address: Address | None = None

    @classmethod
    def parse(cls, text: str, *, option: str = "webhook") -> Self:
        """The URL in `text`. `option`: what errors call it.

        Raises:
            WebhookUrlRefused: it is none, or is written in a way that parsers may read differently.
        """
        _check_characters(text, option)
        whole = _URL.fullmatch(text)
        if whole is None:
            refuse(option, "is no absolute URL", "write https://HOST/PATH")
        scheme = whole["scheme"].lower()
        if scheme not in DEFAULT_PORTS:
            refuse(option, f"has the scheme {scheme[:20]!r}", "use https")
        if "@" in whole["authority"]:
            refuse(option, "has a user or password", "leave it out; the signature tells the receiver who calls")
        parts = _AUTHORITY.fullmatch(whole["authority"])
        if parts is None:
            refuse(option, "has a host or port that cannot be read", "write HOST, HOST:PORT or [IPV6]:PORT")
        port = DEFAULT_PORTS[scheme] if parts["port"] is None else int(parts["port"])
        if not 1 <= port <= 65535:
            refuse(option, f"has the port {port}", "use one of 1 to 65535")
        host = parts["host"] if parts["v6"] is None else parts["v6"]
        address = _host_address(host, option) if parts["v6"] is None else _v6(host, option)
        path, mark, query = whole["rest"].partition("?")
        return cls(
            scheme=scheme,
            host=str(address) if address is not None else read_name(host, option=option),
            port=port,
            path=path or "/",
            query=mark + query,
            address=address,
        )

    @property
    def origin(self) -> str:
        """Scheme, host and, where it is not the scheme's own, port: fit for messages and logs."""
        host = f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host
        return f"{self.scheme}://{host}" + (f":{self.port}" if self.port != DEFAULT_PORTS[self.scheme] else "")

    @property
    def endpoint(self) -> str:
        """Scheme, host, port and path: what a receiver that answers 410 has given up."""
        return self.origin + self.path

    def __str__(self) -> str:
        return self.endpoint + self.query


def refuse(option: str, wrong: str, fix: str) -> NoReturn:
    """Raises `WebhookUrlRefused`: what is wrong with an option, and what to do."""
    raise WebhookUrlRefused(f"{option} {wrong}: {fix}", field=option)


def read_name(host: str, *, option: str = "webhook") -> str:
    """A host name in lower-case ASCII, without a dot at its end.

    Raises:
        WebhookUrlRefused: it is no host name.
    """
    name = _ascii(host, option).removesuffix(".")
    if not name:
        refuse(option, "has no host", "write https://HOST/PATH")
    if len(name) > _MAX_NAME_CHARACTERS or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        refuse(option, f"has the host {host[:80]!a}, which is no host name", "use letters, digits, hyphens and dots")
    return name


def _check_characters(text: str, option: str) -> None:
    if not isinstance(text, str):
        refuse(option, "is no text", "give a URL")
    if len(text) > MAX_URL_CHARACTERS:
        refuse(option, f"has {len(text)} characters", f"use at most {MAX_URL_CHARACTERS}")
    if "#" in text:
        refuse(option, "has a fragment (#), which is never sent", "leave it out, or write %23")
    if _FORBIDDEN.search(text):
        refuse(option, "has spaces, control characters, backslashes or quotes", "percent-encode them")
    whole = _URL.fullmatch(text)
    if whole is not None and not whole["rest"].isascii():
        refuse(option, "has a path or query that is not ASCII", "percent-encode it")


def _ascii(host: str, option: str) -> str:
    if host.isascii():
        return host.lower()
    import idna  # its tables take longer to load than everything else here, and few hosts need them

    try:
        return idna.encode(host, uts46=True).decode().lower()
    except UnicodeError:
        refuse(option, f"has the host {host[:80]!a}, which IDNA does not allow", "write it in ASCII (xn--…)")


def _v6(host: str, option: str) -> IPv6Address:
    try:
        return IPv6Address(host)
    except AddressValueError:
        refuse(option, f"has the host [{host[:80]}], which is no IPv6 address", "write it as in RFC 5952")


def _host_address(host: str, option: str) -> IPv4Address | None:
    """The IPv4 address that a host is, in any notation that some resolver understands; None: it is a name.

    The rule is that of browsers (WHATWG URL, "ends in a number" and "IPv4 parser"): up to four parts, each decimal,
    octal with a leading 0 or hexadecimal with 0x, the last one filling what is left.
    """
    labels = _ascii(host, option).removesuffix(".").split(".")
    if not _NUMBER.fullmatch(labels[-1]):
        return None
    wrong = f"has the host {host[:80]!a}, which looks like an IPv4 address and is none"
    if len(labels) > 4 or not all(_NUMBER.fullmatch(label) and len(label) <= _MAX_NAME_CHARACTERS for label in labels):
        refuse(option, wrong, "write four numbers from 0 to 255, or a name")
    try:
        *firsts, last = (_number(label) for label in labels)
    except ValueError:
        refuse(option, wrong, "write it without leading zeros")
    if any(first > 255 for first in firsts) or last >= 256 ** (4 - len(firsts)):
        refuse(option, wrong, "write four numbers from 0 to 255, or a name")
    return IPv4Address(last + sum(first << (24 - 8 * place) for place, first in enumerate(firsts)))


def _number(label: str) -> int:
    if label.startswith("0x"):
        return int(label[2:] or "0", 16)
    return int(label, 8 if label.startswith("0") else 10)
