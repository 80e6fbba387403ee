"""Where webhooks may go: no URL that a submitter chose leads this network's own services to be called.

DESIGN. Two checks. `check_url` at submit refuses what can be known from the URL; `check_address` at delivery, by the
connection's real address, refuses the rest: a name that resolves to a private address, now or only this time (DNS
rebinding). The second one is what protects; the first one tells people early. The courier's connector runs both for
every connection (`worker/courier/guarded_connector.py`), so that a URL that passed under other settings gains
nothing.

Without an allow-list: https, on a listed port, to a public address (`public_address.py`). An operator who runs
receivers inside adds them to LATENTQ_WEBHOOK_ALLOW. A name there is trusted wherever it resolves; a network lets any
name through that resolves into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final, Self

from broker_config.errors import WebhookAddressRefused, WebhookUrlRefused
from broker_config.public_address import Address, special_purpose
from broker_config.receiver_url import DEFAULT_PORTS, ReceiverUrl, read_name, refuse

if TYPE_CHECKING:
    from broker_config.settings import Settings

__all__ = ["DEFAULT_PORT_LIST", "AllowedReceiver", "UrlGuard"]

#: Where web servers with TLS listen.
DEFAULT_PORT_LIST: Final = (443, 8443)
_ENTRY: Final = re.compile(
    r"(?:(?P<scheme>https?)://)?"
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:/\d{1,3})?)\]|(?P<host>[^\[\]:/]+(?:/\d{1,2})?))"
    r"(?::(?P<port>\d{1,5}|\*))?"
)
#: Names that mean a machine here or in the local network, whoever asks (RFC 6761, 6762, 8375; ICANN on `internal`),
#: that are never in the DNS, or that a hosts file has.
_INNER_DOMAINS: Final = ("localhost", "localdomain", "local", "internal", "home.arpa", "invalid", "onion")
_ALLOW: Final = "LATENTQ_WEBHOOK_ALLOW"


@dataclass(frozen=True, kw_only=True, slots=True)
class AllowedReceiver:
    """One entry of the allow-list: `[SCHEME://]HOST[:PORT]`.

    HOST is a name, `*.NAME` for every name below it, an address or a network; an IPv6 one with a port is in brackets.
    Without a scheme, https. Without a port, the listed ones (http: 80); with `*`, any.
    """

    scheme: str
    #: In lower-case ASCII; None: a network.
    name: str | None
    #: Whether it is every name below `name` instead.
    below: bool = False
    network: IPv4Network | IPv6Network | None = None
    #: None: the listed ones; 0: any.
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The entry in `text`.

        Raises:
            ValueError: it is none.
        """
        found = _ENTRY.fullmatch(text)
        # An IPv6 network without a scheme and a port needs no brackets.
        host = text if found is None else (found["v6"] or found["host"])
        scheme = (found and found["scheme"]) or "https"
        port = found["port"] if found is not None else None
        if port not in (None, "*") and not 1 <= int(port) <= 65535:
            raise ValueError(f"{text!r} has no port from 1 to 65535")
        number = None if port is None else 0 if port == "*" else int(port)
        try:
            return cls(scheme=scheme, name=None, network=ip_network(host), port=number)
        except ValueError as error:
            if found is None or found["v6"] or "/" in host or host[-1].isdigit():
                raise ValueError(f"{text!r} is no [SCHEME://]HOST[:PORT], HOST a name or a network: {error}") from None
        try:
            name = read_name(host.removeprefix("*."))
        except WebhookUrlRefused:
            raise ValueError(f"{text!r} is no [SCHEME://]HOST[:PORT], HOST a name or a network") from None
        return cls(scheme=scheme, name=name, below=host.startswith("*."), port=number)

    def carries(self, url: ReceiverUrl, ports: tuple[int, ...]) -> bool:
        """Whether it allows the URL's scheme and port. `ports`: the listed ones."""
        listed = ports if self.scheme == "https" else (DEFAULT_PORTS["http"],)
        fits = url.port in listed if self.port is None else self.port in (0, url.port)
        return self.scheme == url.scheme and fits

    def names(self, url: ReceiverUrl) -> bool:
        """Whether it names the URL's host."""
        if self.name is None:
            return False
        return url.host.endswith(f".{self.name}") if self.below else url.host == self.name

    def holds(self, address: Address) -> bool:
        """Whether the address is in its network."""
        return self.network is not None and address in self.network


@dataclass(frozen=True, kw_only=True)
class UrlGuard:
    """Says where webhooks may go."""

    #: Ports of receivers outside.
    ports: tuple[int, ...] = DEFAULT_PORT_LIST
    #: Receivers inside.
    allow: tuple[AllowedReceiver, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The guard that the settings ask for."""
        return cls.allowing(settings.webhook_allow, ports=settings.webhook_ports)

    @classmethod
    def allowing(cls, entries: Iterable[str], *, ports: tuple[int, ...] = DEFAULT_PORT_LIST) -> Self:
        """A guard with an allow-list.

        Raises:
            ValueError: an entry is none.
        """
        return cls(ports=ports, allow=tuple(AllowedReceiver.parse(entry) for entry in entries))

    def check_url(self, text: str, *, option: str = "webhook") -> ReceiverUrl:
        """The URL to call for `text`, as far as can be known before anyone resolves its name. Asks no network.

        Raises:
            WebhookUrlRefused: it may not be called; the message names `option` and the fix.
        """
        url = ReceiverUrl.parse(text, option=option)
        entries = self._entries_for(url)
        if any(entry.names(url) for entry in entries):
            return url
        if url.address is not None:
            if not any(entry.holds(url.address) for entry in entries):
                self._check_outside(url, option)
                self._check_literal(url.address, option)
            return url
        if any(entry.network is not None for entry in entries):
            return url  # it may resolve into that network; whether it does is seen at delivery
        self._check_outside(url, option)
        if "." not in url.host:
            refuse(option, f"has the host {url.host!r}, which is no full name", f"use one, or add it to {_ALLOW}")
        if any(f".{url.host}".endswith(f".{domain}") for domain in _INNER_DOMAINS):
            refuse(option, f"has the host {url.host!r}, which is inside", f"use a public one, or add it to {_ALLOW}")
        return url

    def check_address(self, address: Address | str, url: ReceiverUrl) -> None:
        """Raises `WebhookAddressRefused` if `url` may not be called at this address.

        The message does not have the address: submitters see it, and must not learn how names inside resolve.
        """
        real = ip_address(address) if isinstance(address, str) else address
        entries = self._entries_for(url)
        if any(entry.names(url) or entry.holds(real) for entry in entries):
            return
        outside = url.scheme == "https" and url.port in self.ports
        if not outside or special_purpose(real) is not None:
            raise WebhookAddressRefused(
                f"{url.host} leads to an address that may not be called: use a receiver with a public address, or "
                f"have the operator add it to {_ALLOW}",
                field="webhook",
            )

    @cached_property
    def _listed(self) -> str:
        return ", ".join(str(port) for port in self.ports)

    def _entries_for(self, url: ReceiverUrl) -> tuple[AllowedReceiver, ...]:
        return tuple(entry for entry in self.allow if entry.carries(url, self.ports))

    def _check_outside(self, url: ReceiverUrl, option: str) -> None:
        """What is asked of receivers that are not on the allow-list."""
        if url.scheme != "https":
            refuse(option, "is not https", f"use https, or add {url.origin} to {_ALLOW}")
        if url.port not in self.ports:
            refuse(option, f"has the port {url.port}", f"use {self._listed}, or add the port to LATENTQ_WEBHOOK_PORTS")

    def _check_literal(self, address: Address, option: str) -> None:
        purpose = special_purpose(address)
        if purpose is not None:
            raise WebhookAddressRefused(
                f"{option} has the host {address}, which is not a public address ({purpose}): use a public one, or "
                f"add it to {_ALLOW}",
                field=option,
            )
