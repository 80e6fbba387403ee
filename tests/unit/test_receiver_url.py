"""URLs of receivers: what is read in them, what is refused before anyone resolves a name, and the allow-list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from broker_config.errors import ConfigurationError, WebhookAddressRefused, WebhookUrlRefused
from broker_config.receiver_url import ReceiverUrl
from broker_config.settings import load_settings
from broker_config.url_guard import AllowedReceiver, UrlGuard


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://Example.COM:443/A?b=C", "https://example.com/A?b=C"),
        ("https://example.com:8443/hook", "https://example.com:8443/hook"),
        ("https://example.com./hook", "https://example.com/hook"),
        ("https://example.com?x=https://user@other/", "https://example.com/?x=https://user@other/"),
        ("https://bücher.example/", "https://xn--bcher-kva.example/"),  # RFC 3492 §7.1, and every IDNA tutorial
        ("https://BÜCHER。example/", "https://xn--bcher-kva.example/"),
        ("https://my_receiver.example.com/", "https://my_receiver.example.com/"),
        ("https://[2600::0001]/", "https://[2600::1]/"),
        ("https://1e100.net/", "https://1e100.net/"),
    ],
)
def test_a_url_is_handed_on_in_one_form(text: str, written: str) -> None:
    assert str(UrlGuard().check_url(text)) == written


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no absolute URL"),
        ("example.com/hook", "no absolute URL"),
        ("//example.com/hook", "no absolute URL"),
        ("https:example.com", "no absolute URL"),
        ("https:///hook", "no host"),
        ("https://./", "no host"),
        ("ftp://example.com/", "scheme 'ftp'"),
        ("file:///etc/passwd", "scheme 'file'"),
        ("http://example.com/", "not https"),
        ("https://example.com:22/", "port 22"),
        ("https://example.com:0/", "port 0"),
        ("https://example.com:65536/", "port 65536"),
        ("https://example.com:/", "cannot be read"),
        ("https://example.com:4:3/", "cannot be read"),
        ("https://example.com:٤٤٣/", "cannot be read"),
        ("https://user@example.com/", "user or password"),
        ("https://user:secret@example.com/", "user or password"),
        ("https://example.com#@evil.example/", "fragment"),
        ("https://example.com/#", "fragment"),
        ("https://example.com\\@evil.example/", "backslashes"),
        ("https://example.com/\r\nX-Header: 1", "control characters"),
        ("https://example.com/a b", "spaces"),
        (" https://example.com/", "spaces"),
        ("https://example.com/\x85", "control characters"),
        ("https://example.com/bücher", "not ASCII"),
        ("https://exa%6dple.com/", "no host name"),
        ("https://example..com/", "no host name"),
        ("https://-example.com/", "no host name"),
        ("https://example.com,evil.example/", "no host name"),
        (f"https://{'a' * 64}.com/", "no host name"),
        (f"https://{'a.' * 127}com/", "no host name"),
        ("https://a／b.example/", "IDNA"),
        ("https://[fe80::1%25eth0]/", "cannot be read"),
        ("https://[::1/", "cannot be read"),
        ("https://::1/", "cannot be read"),
        ("https://[12345::]/", "no IPv6 address"),
        ("https://[v1.x]/", "cannot be read"),
        ("https://256.1.1.1/", "none"),
        ("https://1.2.3.4.5/", "none"),
        ("https://08.8.8.8/", "leading zeros"),
        ("https://4294967296/", "none"),
        ("https://1.16777216/", "none"),
        ("https://receiver.1/", "none"),
        ("https://localhost/", "full name"),
        ("https://redis/", "full name"),
        ("https://a.localhost/", "is inside"),
        ("https://metadata.google.internal/", "is inside"),
        ("https://printer.local./", "is inside"),
        ("https://router.home.arpa/", "is inside"),
        ("https://Ⓛocalhost.Ⓛocaldomain/", "is inside"),
        ("https://example.com/" + "a" * 2048, "characters"),
    ],
)
def test_a_url_that_may_not_be_called_is_refused_with_what_is_wrong(text: str, wrong: str) -> None:
    with pytest.raises(WebhookUrlRefused, match=wrong) as refusal:
        UrlGuard().check_url(text)
    assert refusal.value.code == "webhook_url_refused"
    assert refusal.value.field == "webhook"
    assert not refusal.value.retryable
    assert ": " in refusal.value.message, "the fix"


@pytest.mark.parametrize("text", ["https://user:hunter2@example.com/", "http://example.com/hunter2?t=hunter2"])
def test_no_message_repeats_a_secret_of_the_url(text: str) -> None:
    with pytest.raises(WebhookUrlRefused) as refusal:
        UrlGuard().check_url(text)
    assert "hunter2" not in refusal.value.message
    assert "hunter2" not in repr(ReceiverUrl.parse("https://example.com/hunter2?t=hunter2"))


@given(st.text(max_size=60) | st.from_regex(r"https?://[^/]{0,30}/.{0,10}", fullmatch=True))
def test_whatever_passes_is_read_the_same_by_the_client_that_will_call_it(text: str) -> None:
    try:
        url = UrlGuard().check_url(text)
    except WebhookUrlRefused:
        return
    read = URL(str(url), encoded=True)
    assert (read.scheme, read.raw_host, read.port) == (url.scheme, url.host, url.port)
    assert (read.raw_path, read.raw_user, read.raw_fragment) == (url.path, None, "")
    assert UrlGuard().check_url(str(url)) == url, "its one form is its one form"


# The allow-list -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "allowed", "not_allowed"),
    [
        ("receiver", ["https://receiver/", "https://receiver:8443/"], ["http://receiver/", "https://other/"]),
        ("receiver:9000", ["https://receiver:9000/"], ["https://receiver/", "https://receiver:9001/"]),
        ("http://receiver", ["http://receiver/"], ["https://receiver/", "http://receiver:8080/"]),
        ("http://receiver:*", ["http://receiver:8080/", "http://receiver/"], ["https://receiver/"]),
        ("*.svc.cluster.local", ["https://a.svc.cluster.local/"], ["https://svc.cluster.local/", "https://x.local/"]),
        ("Bücher.internal", ["https://xn--bcher-kva.internal/"], ["https://b.internal/"]),
        ("10.1.0.0/16", ["https://10.1.2.3/", "https://0xa010203/"], ["https://10.2.0.1/", "http://10.1.2.3/"]),
        ("http://127.0.0.1:9", ["http://127.0.0.1:9/"], ["http://127.0.0.2:9/", "http://127.0.0.1/"]),
        ("fd00::/8", ["https://[fd00::1]/"], ["https://[fc00::1]/"]),
        ("[fd00::/8]:9", ["https://[fd00::1]:9/"], ["https://[fd00::1]/"]),
    ],
)
def test_an_entry_allows_what_it_names(entry: str, allowed: list[str], not_allowed: list[str]) -> None:
    guard = UrlGuard.allowing([entry])
    for text in allowed:
        guard.check_url(text)
    for text in not_allowed:
        with pytest.raises(WebhookUrlRefused):
            guard.check_address("10.255.0.1", guard.check_url(text))
    guard.check_url("https://example.com/")


def test_an_allowed_name_is_trusted_wherever_it_resolves_and_no_other_name_is() -> None:
    guard = UrlGuard.allowing(["receiver.internal"])
    guard.check_address("10.0.0.1", guard.check_url("https://receiver.internal/"))
    with pytest.raises(WebhookAddressRefused):
        guard.check_address("10.0.0.1", guard.check_url("https://example.com/"))


def test_an_allowed_network_lets_names_through_that_resolve_into_it_and_no_others() -> None:
    guard = UrlGuard.allowing(["http://10.0.0.0/8:8080"])
    url = guard.check_url("http://receiver:8080/")
    guard.check_address("10.9.8.7", url)
    for address in ("192.168.0.1", "8.8.8.8", "::ffff:10.0.0.1"):  # plain http to a public address is not allowed
        with pytest.raises(WebhookAddressRefused):
            guard.check_address(address, url)
    with pytest.raises(WebhookAddressRefused):
        guard.check_address("10.9.8.7", guard.check_url("https://example.com/"))


@pytest.mark.parametrize("entry", ["a b", "http://", ":80", "receiver:0", "receiver:70000", "10.0.0.1/8", "1.2.3", "*"])
def test_an_entry_that_is_none_is_refused_when_the_settings_are_read(entry: str) -> None:
    with pytest.raises(ValueError, match=r"is no|has no"):
        AllowedReceiver.parse(entry)
    with pytest.raises(ConfigurationError, match="LATENTQ_WEBHOOK_ALLOW"):
        load_settings(webhook_allow=entry, _env_file=None)


def test_the_settings_make_the_guard() -> None:
    six = load_settings(webhook_allow="[fd12:3456::/32]:8443, receiver", _env_file=None)
    assert six.webhook_allow == ("[fd12:3456::/32]:8443", "receiver")
    assert load_settings(webhook_allow='["[::1]:80", "receiver"]', _env_file=None).webhook_allow == (
        "[::1]:80",
        "receiver",
    )
    guard = UrlGuard.of(load_settings(webhook_allow="receiver, 10.0.0.0/8", webhook_ports="443,9443", _env_file=None))
    guard.check_url("https://example.com:9443/")
    guard.check_url("https://receiver/")
    guard.check_url("https://10.0.0.1/")
    with pytest.raises(WebhookUrlRefused, match="use 443, 9443"):
        guard.check_url("https://example.com:8443/")
    with pytest.raises(ConfigurationError, match="LATENTQ_WEBHOOK_PORTS"):
        load_settings(webhook_ports="0", _env_file=None)
