"""Under which names the gateway is reached, and whether by strangers: what address and settings say together."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import urlsplit

from broker_config.settings import Settings
from producer.gateway.settings import GatewaySettings


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Who can reach a gateway, and as what."""

    own: GatewaySettings
    #: The URL that others see it under; None: its address.
    public_url: str | None

    @classmethod
    def of(cls, settings: Settings, own: GatewaySettings) -> Reach:
        """That of a gateway with these settings."""
        url = settings.public_url
        return cls(own=own, public_url=None if url is None else url.rstrip("/"))

    @cached_property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.own.host)

    @cached_property
    def names(self) -> frozenset[str]:
        """Host names under which it may be asked, lower case, without port."""
        given = {*(name.lower() for name in self.own.allowed_hosts), self.own.host.lower(), "localhost"}
        return frozenset(given if self.public_url is None else {*given, _host_of(self.public_url)})

    @cached_property
    def needs_key(self) -> bool:
        """Whether a request without a key is refused."""
        return self.why_key is not None

    @cached_property
    def why_key(self) -> str | None:
        """The setting by which a request without a key is refused, and what follows from it; None: none is.

        A proxy on this machine would make strangers look local, so a name of its own counts as being reached by others.
        """
        if self.own.auth == "required":
            return "LATENTQ_GATEWAY_AUTH is `required`"
        if not self.is_loopback:
            return f"others can reach {self.own.host} (LATENTQ_GATEWAY_HOST)"
        if self.own.allowed_hosts:
            return f"others ask for {', '.join(self.own.allowed_hosts)} (LATENTQ_GATEWAY_ALLOWED_HOSTS)"
        if self.public_url is not None and not is_loopback(_host_of(self.public_url)):
            return f"others reach it as {self.public_url} (LATENTQ_PUBLIC_URL)"
        return None

    @property
    def has_tls(self) -> bool:
        """Whether browsers see it over TLS."""
        return self.public_url is not None and self.public_url.startswith("https:")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, to itself only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_of(url: str) -> str:
    return (urlsplit(url).hostname or "").lower()
