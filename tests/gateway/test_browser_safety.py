"""What a browser could be made to do: other sites' pages, rebound names, stolen sessions, sniffed types."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import redis
import requests

from broker_config import keys
from broker_config.connection import connect_url
from broker_config.errors import ConfigurationError
from broker_config.settings import Settings, load_settings
from broker_config.vae_catalog import VaeCatalog
from producer.gateway.app import check_startable
from producer.gateway.reach import Reach
from producer.gateway.sessions import MOST_SESSIONS
from producer.gateway.settings import load_gateway_settings
from tests.gateway.conftest import problem
from tests.gateway.test_job_api import submit
from tests.support.gateways import RunningGateway
from tests.support.processes import environment_of

# Where it listens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "because"),
    [
        ({}, ""),
        ({"host": "localhost"}, ""),
        ({"host": "::1"}, ""),
        ({"host": "127.0.0.2"}, ""),
        ({"host": "0.0.0.0"}, "LATENTQ_GATEWAY_HOST"),
        ({"host": "::"}, "LATENTQ_GATEWAY_HOST"),
        ({"host": "192.0.2.1"}, "LATENTQ_GATEWAY_HOST"),
        ({"host": "gateway.example"}, "LATENTQ_GATEWAY_HOST"),
        ({"auth": "required"}, "LATENTQ_GATEWAY_AUTH"),
        # a proxy on this machine makes strangers look local
        ({"allowed_hosts": "gateway.example"}, "LATENTQ_GATEWAY_ALLOWED_HOSTS"),
        ({"public_url": "https://latentq.example"}, "LATENTQ_PUBLIC_URL"),
    ],
)
def test_others_need_keys_and_without_any_it_does_not_start(
    own: dict[str, str], because: str, broker_url: str, new_key: Callable[..., str]
) -> None:
    shared = load_settings(_env_file=None, public_url=own.get("public_url"))
    settings = load_gateway_settings(
        _env_file=None, **{name: value for name, value in own.items() if name != "public_url"}
    )
    assert Reach.of(shared, settings).needs_key is bool(because)
    connections = connect_url(broker_url, name="latentq-test")
    catalog = VaeCatalog.load()
    try:
        if because:
            with pytest.raises(ConfigurationError, match="latentq keys add") as refusal:
                check_startable(connections, shared, settings, catalog=catalog)
            assert because in refusal.value.message
            assert "--no-gateway" in refusal.value.message
            new_key("submit")
        check_startable(connections, shared, settings, catalog=catalog)
    finally:
        connections.close()


def test_the_command_ends_with_a_line_that_says_what_to_do(settings: Settings, gateway: RunningGateway) -> None:
    command = [sys.executable, "-m", "producer.gateway"]
    for more, words in (
        (["--host", "0.0.0.0"], "latentq keys add"),
        (["--port", str(gateway.port)], "LATENTQ_GATEWAY_PORT"),
        (["--default-vae", "nobody"], "no VAE 'nobody'"),
    ):
        done = subprocess.run(
            [*command, *more], env=environment_of(settings), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_a_proxy_on_this_machine_does_not_make_strangers_local(gateway: RunningGateway) -> None:
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
        assert problem(gateway.get("/v1/decodes", headers={name: "192.0.2.7"})) == (401, "not_authenticated")


# Host and Origin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "192.0.2.1", "", "[::2]", "a@b"]
)
def test_a_name_that_leads_here_and_is_not_ours_is_refused(gateway: RunningGateway, host: str) -> None:
    answer = gateway.get("/v1/decodes", headers={"Host": host})
    assert problem(answer) in ((421, "wrong_host"), (400, "bad_request"))
    assert problem(gateway.get("/", headers={"Host": "evil.example"})) == (421, "wrong_host")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:{port}", "127.0.0.1", "[::1]:{port}", "127.9.9.9"])
def test_our_own_names_are_not(gateway: RunningGateway, host: str) -> None:
    assert gateway.get("/v1/decodes", headers={"Host": host.format(port=gateway.port)}).status_code == 200


def test_a_name_that_was_allowed_is_ours(gateways: Callable[..., RunningGateway]) -> None:
    gateway = gateways(allowed_hosts="queue.example, other.example")
    assert gateway.get("/livez", headers={"Host": "queue.example:8765"}).status_code == 200
    assert problem(gateway.get("/livez", headers={"Host": "third.example"})) == (421, "wrong_host")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
)
def test_another_sites_page_changes_nothing(gateway: RunningGateway, headers: dict[str, str]) -> None:
    submit(gateway, name="cat")
    assert problem(gateway.post("/v1/decodes/cat/cancel", headers=headers)) == (403, "not_allowed")
    assert gateway.get("/v1/decodes/cat").json()["status"] == "queued"


def test_another_sites_page_reads_nothing_but_may_link(gateway: RunningGateway) -> None:
    assert problem(gateway.get("/v1/decodes", headers={"Sec-Fetch-Site": "cross-site"})) == (403, "not_allowed")
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert gateway.get("/", headers=link).status_code == 200
    answer = gateway.get("/v1/decodes", headers={"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_our_own_page_may(gateway: RunningGateway) -> None:
    submit(gateway, name="cat")
    own = {"Origin": gateway.url, "Sec-Fetch-Site": "same-origin"}
    assert gateway.post("/v1/decodes/cat/cancel", headers=own).json()["status"] == "canceled"


# Sessions -------------------------------------------------------------------------------------------------------


def log_in(gateway: RunningGateway, token: str) -> tuple[requests.Session, str]:
    browser = requests.Session()
    answer = browser.post(f"{gateway.url}/session", json={"token": token}, timeout=30)
    assert answer.status_code == 200, answer.text
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    return browser, answer.json()["csrf"]


def test_a_session_reads_with_its_cookie_and_changes_with_its_token_too(
    guarded: RunningGateway, new_key: Callable[..., str], admin: redis.Redis
) -> None:
    token = new_key("submit", "read")
    submit(guarded, key=token, name="cat")
    browser, csrf = log_in(guarded, token)
    assert [job["id"] for job in browser.get(f"{guarded.url}/v1/decodes").json()["jobs"]] == ["cat"]
    url = f"{guarded.url}/v1/decodes/cat/cancel"
    assert problem(browser.post(url)) == (403, "not_allowed")
    assert problem(browser.post(url, headers={"X-CSRF-Token": "x"})) == (403, "not_allowed")
    assert browser.post(url, headers={"X-CSRF-Token": csrf}).json()["status"] == "canceled"
    assert browser.get(f"{guarded.url}/session").json()["csrf"] == csrf
    # The cookie itself is not in the broker, and what is there ends by itself.
    (name,) = admin.scan_iter(keys.session("*"))
    value = str(browser.cookies["latentq_session"]).encode()
    assert value not in name
    assert value.decode() not in str(admin.get(name))
    assert 0 < admin.ttl(name) <= 43_200
    assert browser.delete(f"{guarded.url}/session", headers={"X-CSRF-Token": csrf}).status_code == 204
    assert admin.exists(name) == 0
    browser.cookies.set("latentq_session", value.decode())
    assert problem(browser.get(f"{guarded.url}/v1/decodes")) == (401, "not_authenticated")


def test_a_key_has_so_many_sessions_and_a_new_one_ends_the_oldest(
    guarded: RunningGateway, new_key: Callable[..., str], admin: redis.Redis
) -> None:
    token, other = new_key("read"), new_key("read")
    stays, _ = log_in(guarded, other)
    listed = keys.sessions(token.split("_")[1])
    browsers = [log_in(guarded, token)]
    (first,) = admin.zscan_iter(listed)
    admin.zincrby(listed, -1000, first[0])  # the others are no longer of its millisecond
    browsers += [log_in(guarded, token) for _ in range(MOST_SESSIONS - 1)]
    third, csrf = browsers[2]
    assert third.delete(f"{guarded.url}/session", headers={"X-CSRF-Token": csrf}).status_code == 204
    browsers += [log_in(guarded, token) for _ in range(2)]  # in place of the third, and of the first
    holding = [browser.get(f"{guarded.url}/v1/decodes").status_code for browser, _ in browsers]
    assert holding == [401, 200, 401, *[200] * (MOST_SESSIONS - 1)]
    assert stays.get(f"{guarded.url}/v1/decodes").status_code == 200
    assert len(list(admin.scan_iter(keys.session("*")))) == MOST_SESSIONS + 1
    assert admin.zcard(listed) == MOST_SESSIONS
    assert 0 < admin.ttl(listed) <= 43_200


def test_logging_in_takes_a_key(guarded: RunningGateway) -> None:
    assert problem(guarded.post("/session", json={"token": "lq_nonsense"})) == (401, "not_authenticated")
    for body in (b"", b"[]", b"{", b'{"token": 7}', b"\xff"):
        assert problem(guarded.post("/session", data=body))[0] in (400, 401)


def test_a_cookie_or_a_token_of_any_bytes_is_none_of_ours(
    guarded: RunningGateway, gateway: RunningGateway, new_key: Callable[..., str]
) -> None:
    odd = {"Cookie": b"latentq_session=\xff\xfe"}
    assert problem(guarded.get("/v1/decodes", headers=odd)) == (401, "not_authenticated")
    assert gateway.get("/v1/decodes", headers=odd).status_code == 200
    assert gateway.ask("DELETE", "/session", headers=odd).status_code == 204
    browser, _ = log_in(guarded, new_key("submit", "read"))
    odd_token: dict[str, str | bytes] = {"X-CSRF-Token": b"\xff"}
    assert problem(browser.post(f"{guarded.url}/v1/decodes/cat/cancel", headers=odd_token)) == (403, "not_allowed")


@pytest.mark.parametrize(
    ("public_url", "needs_key"),
    [("https://gateway.example", True), ("http://127.0.0.1:8765", False), ("http://localhost:8765/", False)],
)
def test_a_public_url_that_is_not_this_machine_means_strangers(public_url: str, needs_key: bool) -> None:
    shared = load_settings(public_url=public_url, _env_file=None)
    assert Reach.of(shared, load_gateway_settings(_env_file=None)).needs_key is needs_key


def test_the_cookie_is_for_tls_only_behind_a_tls_proxy(
    gateways: Callable[..., RunningGateway], new_key: Callable[..., str], settings: Settings
) -> None:
    token = new_key("read")
    gateway = gateways(settings.model_copy(update={"public_url": "https://queue.example"}))
    answer = gateway.post("/session", json={"token": token}, headers={"Origin": "https://queue.example"})
    assert "Secure" in answer.headers["Set-Cookie"]


# Pages ----------------------------------------------------------------------------------------------------------


def test_every_answer_forbids_sniffing_and_framing(gateway: RunningGateway) -> None:
    for path in ("/", "/docs", "/static/status.js", "/v1/decodes", "/nothing", "/metrics"):
        headers = gateway.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy


def test_the_pages_load_nothing_from_elsewhere_and_have_nothing_inline(gateway: RunningGateway) -> None:
    import re

    for path in ("/", "/docs"):
        html = gateway.get(path).text
        for target in re.findall(r"(?:src|href)=\"([^\"#]+)\"", html):
            assert target.startswith("/"), target
            assert gateway.get(target).status_code == 200, target
        assert "<style" not in html
        assert " style=" not in html
        assert not re.search(r"\son\w+=", html)
        assert not re.search(r"<script[^>]*>[^<]", html)


@pytest.mark.parametrize("name", ["../app.py", "..%2Fapp.py", "nothing.js", "%00", "status.html/"])
def test_only_the_files_of_the_pages_are_served(gateway: RunningGateway, name: str) -> None:
    assert problem(gateway.get(f"/static/{name}")) == (404, "route_not_found")
