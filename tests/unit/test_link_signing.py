"""Signed links: open one output until they expire, and nothing that was changed in them is overlooked."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.errors import ConfigurationError, LinkExpired, LinkInvalid
from broker_config.link_signing import LinkSigner

KEY, OTHER = "k" * 32, "o" * 32
ENDS_S = 1_800_000_000
#: printf 'latentq-link-1\nGET\n/v1/decodes/cat/output/0\n1800000000' | openssl dgst -sha256 -hmac kkkk… -binary |
#: basenc --base64url
SIGNATURE = "rBrzaNnW8sM160PNqNkJSvAJVxcyXwdhKEov2PIxBbU"


def parts(url: str) -> tuple[str, str, str]:
    """Path, expiry and signature of a link."""
    split = urlsplit(url)
    query = parse_qs(split.query, strict_parsing=True)
    (expires,), (signature,) = query["expires"], query["signature"]
    return split.path, expires, signature


def check(signer: LinkSigner, url: str, *, now_s: float = ENDS_S - 1) -> None:
    path, expires, signature = parts(url)
    signer.check(path, expires=expires, signature=signature, now_s=now_s)


def test_a_link_is_what_the_documentation_says() -> None:
    url = LinkSigner([KEY], "https://queue.example/").output_url("cat", 0, expires_s=ENDS_S)
    assert url == f"https://queue.example/v1/decodes/cat/output/0?expires={ENDS_S}&signature={SIGNATURE}"


def test_a_link_opens_until_it_expires_and_not_in_that_second() -> None:
    signer = LinkSigner([KEY], "https://queue.example")
    url = signer.output_url("cat", 0, expires_s=ENDS_S)
    check(signer, url, now_s=0)
    check(signer, url, now_s=ENDS_S - 0.1)
    with pytest.raises(LinkExpired):
        check(signer, url, now_s=ENDS_S)
    with pytest.raises(LinkExpired):
        check(signer, signer.output_url("cat", 0, expires_s=1), now_s=ENDS_S)


def test_during_a_rotation_every_key_opens_and_the_first_one_signs() -> None:
    old, both, new = (LinkSigner(keys, "https://queue.example") for keys in ([KEY], [OTHER, KEY], [OTHER]))
    url, newer = (signer.output_url("cat", 0, expires_s=ENDS_S) for signer in (old, both))
    check(both, url)
    check(both, newer)
    check(new, newer)
    with pytest.raises(LinkInvalid):
        check(new, url)


def test_there_is_no_signer_without_a_key() -> None:
    for keys in ([], [""], [KEY, ""]):
        with pytest.raises(ConfigurationError, match="LATENTQ_LINK_KEY"):
            LinkSigner(keys, "https://queue.example")


@given(st.data())
def test_a_link_that_was_changed_anywhere_opens_nothing(data: st.DataObject) -> None:
    signer = LinkSigner([KEY], "https://queue.example")
    whole = list(parts(signer.output_url("cat", 0, expires_s=ENDS_S)))
    which = data.draw(st.integers(0, 2))
    text = whole[which]
    at = data.draw(st.integers(0, len(text)))
    changed = text[:at] + data.draw(st.text(max_size=2)) + text[at + data.draw(st.integers(0, 2)) :]
    whole[which] = changed
    if changed == text:
        return
    with pytest.raises(LinkInvalid):
        signer.check(whole[0], expires=whole[1], signature=whole[2], now_s=0)


@given(st.text(), st.text(), st.text())
def test_nothing_made_up_opens_anything(path: str, expires: str, signature: str) -> None:
    with pytest.raises(LinkInvalid):
        LinkSigner([KEY], "https://queue.example").check(path, expires=expires, signature=signature)


@pytest.mark.parametrize("expires", ["-1", "+1800000000", " 1800000000", "1_800_000_000", "٣", "9" * 13, "1e9", ""])
def test_an_expiry_that_is_no_number_opens_nothing_even_if_it_were_signed(expires: str) -> None:
    from broker_config import link_signing

    signature = link_signing._signature(KEY.encode(), "/v1/decodes/cat/output/0", expires)
    with pytest.raises(LinkInvalid):
        LinkSigner([KEY], "x").check("/v1/decodes/cat/output/0", expires=expires, signature=signature, now_s=0)
