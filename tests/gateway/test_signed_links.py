"""Signed links in the gateway: they open one output without a key, for reading, until they expire."""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from broker_config.link_signing import LinkSigner
from broker_config.settings import Settings, load_settings
from tests.gateway.conftest import problem
from tests.gateway.test_job_api import submit
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker

KEY = "k" * 32
Link = Callable[..., str]


@pytest.fixture
def settings(broker_url: str) -> Settings:
    """With links."""
    return load_settings(redis_url=broker_url, public_url="https://queue.example", link_key=KEY, _env_file=None)


@pytest.fixture
def guarded(gateways: Callable[..., RunningGateway]) -> RunningGateway:
    return gateways(auth="required")


@pytest.fixture
def link(guarded: RunningGateway, new_key: Callable[..., str], worker: StoreWorker) -> Link:
    """A job of some key that succeeded; makes paths with a link to it."""
    key = new_key("submit", "read")
    assert submit(guarded, key=key, name="cat").status_code == 202
    claim = worker.claim_one()
    worker.succeed(claim)

    def make(*, number: int = 0, lasts_s: float = 60, signed_with: str = KEY, job_id: str = claim.job_id) -> str:
        signer = LinkSigner([signed_with], "https://queue.example")
        url = signer.output_url(job_id, number, expires_s=round(time.time() + lasts_s))
        split = urlsplit(url)
        return f"{split.path}?{split.query}"

    return make


def test_a_link_opens_the_output_without_a_key(guarded: RunningGateway, link: Link) -> None:
    answer = guarded.get(link())
    assert (answer.status_code, answer.content) == (200, b"picture")
    assert guarded.ask("HEAD", link()).headers["Content-Length"] == "7"
    part = guarded.get(link(), headers={"Range": "bytes=0-2"})
    assert (part.status_code, part.content) == (206, b"pic")
    assert problem(guarded.get(link().partition("?")[0])) == (401, "not_authenticated")


def test_a_page_of_another_site_may_show_it_and_sees_nothing_else(guarded: RunningGateway, link: Link) -> None:
    shown = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    answer = guarded.get(link(), headers=shown)
    assert answer.status_code == 200
    assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert problem(guarded.get(link().partition("?")[0], headers=shown)) == (403, "not_allowed")


def test_it_is_known_under_its_public_name_and_no_other(guarded: RunningGateway, link: Link) -> None:
    assert guarded.get(link(), headers={"Host": "queue.example"}).status_code == 200
    assert problem(guarded.get(link(), headers={"Host": "evil.example"})) == (421, "wrong_host")


def test_a_link_that_expired_or_was_forged_is_refused(guarded: RunningGateway, link: Link) -> None:
    assert problem(guarded.get(link(lasts_s=-1))) == (410, "link_expired")
    forged = link(signed_with="x" * 32)
    answer = guarded.get(forged)
    assert problem(answer) == (403, "link_invalid")
    assert forged.partition("signature=")[2] not in answer.text
    path, _, query = link().partition("?")
    for wrong in (
        f"{path}?{query.replace('expires=1', 'expires=2')}",
        f"{path}?{query}&{query}",
        f"{path}?signature={'A' * 43}",
        f"{path.replace('output/0', 'output/1')}?{query}",
        f"{path.removesuffix('/0')}?{query}",
        f"{path}?{query}&expires=9999999999",
    ):
        assert problem(guarded.get(wrong)) == (403, "link_invalid"), wrong


def test_a_link_opens_its_output_only(guarded: RunningGateway, link: Link) -> None:
    job, _, query = link().partition("/output/0?")
    for method, path in (("GET", job), ("GET", "/v1/decodes"), ("DELETE", job), ("POST", f"{job}/cancel")):
        assert problem(guarded.ask(method, f"{path}?{query}"))[0] == 401
    assert problem(guarded.ask("POST", link()))[0] in (401, 405)
    assert problem(guarded.get(link(number=7))) == (404, "job_not_found")
    assert problem(guarded.get(link(job_id="nobody"))) == (404, "job_not_found")
    assert problem(guarded.get(f"{link()}&vae=sd")) == (422, "invalid_option")


def test_a_link_does_not_lend_the_rights_of_a_key_that_comes_along(guarded: RunningGateway, link: Link) -> None:
    assert guarded.get(link(), key="lq_nobody").status_code == 200, "the link alone decides"


def test_without_a_link_key_no_link_opens(
    gateways: Callable[..., RunningGateway], settings: Settings, link: Link
) -> None:
    for auth in ("auto", "required"):
        gateway = gateways(settings.model_copy(update={"link_key": None}), auth=auth)
        assert problem(gateway.get(link())) == (403, "link_invalid")
