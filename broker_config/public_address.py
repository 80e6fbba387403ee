"""Which IP addresses are public: where strangers may have this process call, and where not.

The tables are the IANA special-purpose registries (RFC 6890), written out instead of asked of `ipaddress`: its answers
differ between patch releases of Python (3.11.7 calls 192.0.0.8 global). Every entry is refused, also the few that are
"globally reachable" (AS112, AMT, anycast of PCP and TURN): no receiver of webhooks is there. Of IPv6 only the space
that IANA gives out as global unicast, 2000::/3, can be public at all. Two prefixes carry an IPv4 address that the
packet ends up at, so they are judged by it: NAT64 (64:ff9b::/96) and 6to4 (2002::/16).

What nobody can know from here: a NAT64 prefix of your own network (RFC 6052), or a private service on public addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

Address = IPv4Address | IPv6Address

#: https://www.iana.org/assignments/iana-ipv4-special-registry and …/multicast-addresses; the last line is Azure's.
_SPECIAL_V4: Final[Mapping[IPv4Network, str]] = {
    IPv4Network(network): name
    for network, name in (
        ("0.0.0.0/8", "this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by a provider's customers"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local, where clouds serve metadata"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "for protocols"),
        ("192.0.2.0/24", "documentation"),
        ("192.31.196.0/24", "AS112"),
        ("192.52.193.0/24", "AMT"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("192.175.48.0/24", "AS112"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        # A public address by its number, but inside Azure a host's own metadata and health service.
        ("168.63.129.16/32", "a cloud's metadata service"),
    )
}
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
#: https://www.iana.org/assignments/iana-ipv6-special-registry. First those with a name that helps; what is not in
#: `_GLOBAL_UNICAST` is special whether or not it stands here.
_SPECIAL_V6: Final[Mapping[IPv6Network, str]] = {
    IPv6Network(network): name
    for network, name in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "IPv4-mapped"),
        ("64:ff9b:1::/48", "local-use NAT64"),
        ("100::/64", "discard-only"),
        ("100:0:0:1::/64", "dummy"),
        ("2001::/32", "Teredo"),
        ("2001::/23", "for protocols"),
        ("2001:db8::/32", "documentation"),
        ("2620:4f:8000::/48", "AS112"),
        ("3fff::/20", "documentation"),
        ("5f00::/16", "segment routing"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
}
_NAT64: Final = IPv6Network("64:ff9b::/96")
_SIX_TO_FOUR: Final = IPv6Network("2002::/16")


def special_purpose(address: Address) -> str | None:
    """What an address is set aside for (`loopback`, `private` …); None: it is public."""
    if isinstance(address, IPv4Address):
        return next((name for network, name in _SPECIAL_V4.items() if address in network), None)
    if address.scope_id is not None:
        return "link-local"
    inside = _address_inside(address)
    if inside is not None:
        return special_purpose(inside)
    named = next((name for network, name in _SPECIAL_V6.items() if address in network), None)
    return named or (None if address in _GLOBAL_UNICAST else "not given out")


def _address_inside(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a packet to `address` ends up at, where the prefix says so."""
    if address in _NAT64:  # 96 bits of prefix, 32 of address (RFC 6052 §2.2)
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    if address in _SIX_TO_FOUR:  # 16 bits of prefix, 32 of address, 80 of subnet and host (RFC 3056 §2)
        return IPv4Address((int(address) >> 80) & 0xFFFF_FFFF)
    return None
