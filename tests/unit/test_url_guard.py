"""The guard against IANA's registries: no special-purpose address passes in any notation, no public one is refused.

The tables are typed in from the registries and not asked of `ipaddress`, whose `is_global` differs between versions:

- IANA IPv4 Special-Purpose Address Registry, https://www.iana.org/assignments/iana-ipv4-special-registry
- IANA IPv6 Special-Purpose Address Registry, https://www.iana.org/assignments/iana-ipv6-special-registry
- IPv4 Multicast Address Space Registry, https://www.iana.org/assignments/multicast-addresses
- Internet Protocol Version 6 Address Space, https://www.iana.org/assignments/ipv6-address-space
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from broker_config.errors import WebhookAddressRefused
from broker_config.url_guard import UrlGuard

#: First address and prefix length. The name of each row is the registry's.
SPECIAL_V4 = {
    ("0.0.0.0", 8): '"This network"',
    ("10.0.0.0", 8): "Private-Use",
    ("100.64.0.0", 10): "Shared Address Space",
    ("127.0.0.0", 8): "Loopback",
    ("169.254.0.0", 16): "Link Local",
    ("172.16.0.0", 12): "Private-Use",
    ("192.0.0.0", 24): "IETF Protocol Assignments",
    ("192.0.0.0", 29): "IPv4 Service Continuity Prefix",
    ("192.0.0.8", 32): "IPv4 dummy address",
    ("192.0.0.9", 32): "Port Control Protocol Anycast",
    ("192.0.0.10", 32): "Traversal Using Relays around NAT Anycast",
    ("192.0.0.170", 31): "NAT64/DNS64 Discovery",
    ("192.0.2.0", 24): "Documentation (TEST-NET-1)",
    ("192.31.196.0", 24): "AS112-v4",
    ("192.52.193.0", 24): "AMT",
    ("192.88.99.0", 24): "Deprecated (6to4 Relay Anycast)",
    ("192.168.0.0", 16): "Private-Use",
    ("192.175.48.0", 24): "Direct Delegation AS112 Service",
    ("198.18.0.0", 15): "Benchmarking",
    ("198.51.100.0", 24): "Documentation (TEST-NET-2)",
    ("203.0.113.0", 24): "Documentation (TEST-NET-3)",
    ("224.0.0.0", 4): "Multicast",
    ("240.0.0.0", 4): "Reserved",
    ("255.255.255.255", 32): "Limited Broadcast",
    # In no registry: Azure's own service, at a public address, for every machine inside Azure.
    ("168.63.129.16", 32): "Azure WireServer",
}
#: Without 64:ff9b::/96 and 2002::/16, which are judged by the address inside.
SPECIAL_V6 = {
    ("::1", 128): "Loopback Address",
    ("::", 128): "Unspecified Address",
    ("::ffff:0:0", 96): "IPv4-mapped Address",
    ("64:ff9b:1::", 48): "IPv4-IPv6 Translat.",
    ("100::", 64): "Discard-Only Address Block",
    ("100:0:0:1::", 64): "Dummy IPv6 Prefix",
    ("2001::", 23): "IETF Protocol Assignments",
    ("2001::", 32): "TEREDO",
    ("2001:1::1", 128): "Port Control Protocol Anycast",
    ("2001:1::2", 128): "Traversal Using Relays around NAT Anycast",
    ("2001:1::3", 128): "DNS-SD Service Registration Protocol Anycast",
    ("2001:2::", 48): "Benchmarking",
    ("2001:3::", 32): "AMT",
    ("2001:4:112::", 48): "AS112-v6",
    ("2001:10::", 28): "Deprecated (previously ORCHID)",
    ("2001:20::", 28): "ORCHIDv2",
    ("2001:30::", 28): "Drone Remote ID Protocol Entity Tags",
    ("2001:db8::", 32): "Documentation",
    ("2620:4f:8000::", 48): "Direct Delegation AS112 Service",
    ("3fff::", 20): "Documentation",
    ("5f00::", 16): "Segment Routing (SRv6) SIDs",
    ("fc00::", 7): "Unique-Local",
    ("fe80::", 10): "Link-Local Unicast",
    ("fec0::", 10): "Site-Local Unicast (returned to IANA)",
    ("ff00::", 8): "Multicast",
}
NAT64 = (int(IPv6Address("64:ff9b::")), 96)
SIX_TO_FOUR = (int(IPv6Address("2002::")), 16)
#: The only space from which addresses of hosts are given out.
GLOBAL_UNICAST = (int(IPv6Address("2000::")), 3)

Block = tuple[int, int]
BLOCKS_V4 = [(int(IPv4Address(first)), 1 << (32 - length)) for first, length in SPECIAL_V4]
BLOCKS_V6 = [(int(IPv6Address(first)), 1 << (128 - length)) for first, length in SPECIAL_V6]


def within(number: int, blocks: list[Block]) -> bool:
    """Whether a number is in one of these; a block is its first number and its size."""
    return any(first <= number < first + size for first, size in blocks)


def in_some(blocks: list[Block]) -> st.SearchStrategy[int]:
    """A number out of one of these, often its first or last."""
    return st.sampled_from(blocks).flatmap(lambda block: st.integers(block[0], block[0] + block[1] - 1))


special_v4 = in_some(BLOCKS_V4)
public_v4 = st.integers(0, 2**32 - 1).filter(lambda number: not within(number, BLOCKS_V4))
special_v6 = in_some(BLOCKS_V6)
public_v6 = st.integers(GLOBAL_UNICAST[0], GLOBAL_UNICAST[0] + (1 << 125) - 1).filter(
    lambda number: not within(number, [*BLOCKS_V6, (SIX_TO_FOUR[0], 1 << 112)])
)


# Notations --------------------------------------------------------------------------------------------------------


@st.composite
def written_v4(draw: st.DrawFn, numbers: st.SearchStrategy[int]) -> tuple[str, int]:
    """An address in some notation that a resolver or browser understands: 1 to 4 parts, each in one of three bases."""
    number = draw(numbers)
    count = draw(st.integers(1, 4))
    firsts = [number >> (24 - 8 * place) & 0xFF for place in range(count - 1)]
    last = number & (1 << (32 - 8 * (count - 1))) - 1
    parts = [
        draw(st.sampled_from((f"{part}", f"0{part:o}", f"000{part:o}", f"0x{part:x}", f"0X{part:X}", f"0x00{part:x}")))
        for part in (*firsts, last)
    ]
    text = ".".join(parts) + draw(st.sampled_from(("", ".")))
    wide = {ord(digit): ord(digit) + 0xFEE0 for digit in "0123456789xX"}  # fullwidth forms, which IDNA maps back
    circled = {ord(digit): 0x2460 + int(digit) - 1 for digit in "123456789"}
    how = draw(st.sampled_from(("plain", "plain", "wide", "circled", "soft")))
    if how == "wide":
        text = text.translate(wide).replace(".", draw(st.sampled_from((".", "。", "．", "｡"))))
    elif how == "circled":
        text = text.translate(circled)
    elif how == "soft":  # a soft hyphen, which nobody sees and IDNA drops
        text = text[0] + "\N{SOFT HYPHEN}" + text[1:]
    return text, number


@st.composite
def written_v6(draw: st.DrawFn, numbers: st.SearchStrategy[int]) -> tuple[str, int]:
    """An address with or without `::`, leading zeros, capitals, and an IPv4 address at its end."""
    number = draw(numbers)
    groups = [number >> (112 - 16 * place) & 0xFFFF for place in range(8)]
    texts = [draw(st.sampled_from((f"{group:x}", f"{group:X}", f"{group:04x}"))) for group in groups]
    if draw(st.booleans()):
        low = number & 0xFFFF_FFFF
        texts[6:] = [".".join(str(low >> shift & 0xFF) for shift in (24, 16, 8, 0))]
        groups[6:] = [1 if low else 0]
    runs = [(start, end) for start in range(len(groups)) for end in range(start + 1, len(groups) + 1)]
    zeros = [(start, end) for start, end in runs if not any(groups[start:end]) and "." not in "".join(texts[start:end])]
    text = ":".join(texts)
    if draw(st.booleans()) and zeros:
        start, end = draw(st.sampled_from(zeros))
        text = ":".join(texts[:start]) + "::" + ":".join(texts[end:])
    return text, number


def refused(text: str) -> bool:
    """Whether both checks refuse this host; they must agree."""
    guard = UrlGuard()
    try:
        url = guard.check_url(f"https://{text}/hook")
    except WebhookAddressRefused:
        return True
    assert url.address is not None
    guard.check_address(url.address, url)
    return False


def refused_address(address: IPv4Address | IPv6Address) -> bool:
    """Whether a name that leads to this address is not called."""
    guard = UrlGuard()
    try:
        guard.check_address(address, guard.check_url("https://receiver.example/hook"))
    except WebhookAddressRefused:
        return True
    return False


# IPv4 -------------------------------------------------------------------------------------------------------------


@given(written_v4(special_v4))
@settings(max_examples=1000)
def test_no_special_ipv4_address_passes_in_any_notation(written: tuple[str, int]) -> None:
    text, number = written
    assert refused(text), SPECIAL_V4
    assert refused_address(IPv4Address(number))


@given(written_v4(public_v4))
@settings(max_examples=1000)
@example(("134744072", 134744072))  # 8.8.8.8
@example(("0x8.8.2056", 134744072))
def test_no_public_ipv4_address_is_refused_and_it_is_called_by_its_usual_name(written: tuple[str, int]) -> None:
    text, number = written
    assert not refused(text)
    assert not refused_address(IPv4Address(number))
    octets = [number >> shift & 0xFF for shift in (24, 16, 8, 0)]
    assert str(UrlGuard().check_url(f"https://{text}/hook")) == f"https://{'.'.join(map(str, octets))}/hook"


@pytest.mark.parametrize(("first", "size"), BLOCKS_V4, ids=[f"{name} {block}" for block, name in SPECIAL_V4.items()])
def test_a_block_of_ipv4_begins_and_ends_where_the_registry_says(first: int, size: int) -> None:
    assert refused_address(IPv4Address(first))
    assert refused_address(IPv4Address(first + size - 1))
    for neighbour in (first - 1, first + size):
        if 0 <= neighbour < 1 << 32:
            assert refused_address(IPv4Address(neighbour)) == within(neighbour, BLOCKS_V4)


# IPv6 -------------------------------------------------------------------------------------------------------------


@given(written_v6(special_v6))
@settings(max_examples=1000)
def test_no_special_ipv6_address_passes_in_any_notation(written: tuple[str, int]) -> None:
    text, number = written
    assert refused(f"[{text}]")
    assert refused_address(IPv6Address(number))


@given(written_v6(public_v6))
@settings(max_examples=1000)
def test_no_public_ipv6_address_is_refused(written: tuple[str, int]) -> None:
    text, number = written
    assert not refused(f"[{text}]")
    assert not refused_address(IPv6Address(number))


@given(st.integers(0, 2**128 - 1))
def test_ipv6_space_that_nobody_gives_out_is_refused(number: int) -> None:
    assume(not within(number, [(GLOBAL_UNICAST[0], 1 << 125), (NAT64[0], 1 << 32)]))
    assert refused_address(IPv6Address(number))


@given(written_v6(special_v4.map(lambda inside: NAT64[0] | inside)))
def test_nat64_of_a_special_address_is_refused(written: tuple[str, int]) -> None:
    assert refused(f"[{written[0]}]")


@given(written_v6(public_v4.map(lambda inside: NAT64[0] | inside)))
def test_nat64_of_a_public_address_passes(written: tuple[str, int]) -> None:
    assert not refused(f"[{written[0]}]")


_rest = st.integers(0, (1 << 80) - 1)


@given(written_v6(st.builds(lambda inside, rest: SIX_TO_FOUR[0] | inside << 80 | rest, special_v4, _rest)))
def test_6to4_of_a_special_address_is_refused(written: tuple[str, int]) -> None:
    assert refused(f"[{written[0]}]")


@given(written_v6(st.builds(lambda inside, rest: SIX_TO_FOUR[0] | inside << 80 | rest, public_v4, _rest)))
def test_6to4_of_a_public_address_passes(written: tuple[str, int]) -> None:
    assert not refused(f"[{written[0]}]")


@given(st.integers(0, 2**32 - 1))
def test_an_ipv4_mapped_address_is_refused_whatever_is_inside(number: int) -> None:
    assert refused(f"[::ffff:{IPv4Address(number)}]")


@pytest.mark.parametrize(("first", "size"), BLOCKS_V6, ids=[f"{name} {block}" for block, name in SPECIAL_V6.items()])
def test_a_block_of_ipv6_begins_and_ends_where_the_registry_says(first: int, size: int) -> None:
    assert refused_address(IPv6Address(first))
    assert refused_address(IPv6Address(first + size - 1))
    for neighbour in (first - 1, first + size):
        if within(neighbour, [(GLOBAL_UNICAST[0], 1 << 125)]) and not within(neighbour, [(SIX_TO_FOUR[0], 1 << 112)]):
            assert refused_address(IPv6Address(neighbour)) == within(neighbour, BLOCKS_V6)


def test_an_address_of_one_interface_is_refused() -> None:
    assert refused_address(IPv6Address("fe80::1%eth0"))
    assert refused_address(IPv6Address("2600::1%eth0"))


def test_who_names_a_receiver_does_not_learn_how_it_resolves_in_here() -> None:
    guard = UrlGuard()
    with pytest.raises(WebhookAddressRefused) as refusal:
        guard.check_address("10.1.2.3", guard.check_url("https://receiver.example/hook"))
    assert (refusal.value.code, refusal.value.field) == ("webhook_address_refused", "webhook")
    assert "10.1.2.3" not in refusal.value.message
    assert "private" not in refusal.value.message
