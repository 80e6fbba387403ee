"""Keys: stored as digests, scoped, limited; and a job is seen by the key that made it or by one that sees all."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import redis
import requests
from typer.testing import CliRunner

from broker_config import keys
from producer.cli import app
from tests.gateway.conftest import SAFETENSORS, problem, safetensors
from tests.gateway.test_job_api import stream, submit
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

MakeKey = Callable[..., str]

# Stored ---------------------------------------------------------------------------------------------------------


def test_the_broker_has_the_digest_and_not_the_secret(new_key: MakeKey, admin: redis.Redis) -> None:
    token = new_key("submit")
    prefix, key_id, secret = token.split("_", 2)
    assert (prefix, len(key_id), len(secret)) == ("lq", 8, 43)
    (entry,) = admin.hgetall(keys.API_KEYS).values()
    assert secret.encode() not in entry
    assert json.loads(entry)["digest"] == hashlib.sha256(secret.encode()).hexdigest()


def test_the_command_line_makes_lists_and_revokes(
    guarded: RunningGateway, broker_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("LATENTQ_REDIS_URL", broker_url)
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, ["keys", "add", "web backend", "--scope", "read", "--scope", "submit"])
    token = made.stdout.strip()
    assert guarded.get("/v1/queues", key=token).status_code == 200
    listed = CliRunner().invoke(app, ["keys", "list", "--json"]).stdout
    (entry,) = json.loads(listed)
    assert (entry["name"], entry["scopes"], entry["revoked_ms"]) == ("web backend", ["read", "submit"], 0)
    assert token not in listed
    assert token.split("_", 2)[2] not in CliRunner().invoke(app, ["keys", "list"]).stdout
    assert CliRunner().invoke(app, ["keys", "revoke", entry["id"]]).exit_code == 0
    wait_until(lambda: guarded.get("/v1/queues", key=token).status_code == 401, timeout_s=10, what="the key to end")


# Shown ----------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_answered_where_one_is_needed(guarded: RunningGateway) -> None:
    for method, path in (("GET", "/v1/decodes"), ("POST", "/v1/decodes"), ("GET", "/metrics"), ("POST", "/decode/sd")):
        answer = guarded.ask(method, path)
        assert problem(answer) == (401, "not_authenticated")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
    for path in ("/livez", "/readyz", "/", "/docs", "/openapi.json", "/static/status.js"):
        assert guarded.get(path).status_code == 200, path


@pytest.mark.parametrize(
    "header",
    [
        "Bearer lq_aaaaaaaa_" + "A" * 43,
        "Bearer nonsense",
        "Bearer ",
        "Basic !!!",
        "Basic " + base64.b64encode(b"user:nonsense").decode(),
        "Digest x",
        "lq_",
    ],
)
def test_a_wrong_key_is_refused_on_loopback_too(gateway: RunningGateway, header: str) -> None:
    assert problem(gateway.get("/v1/queues", headers={"Authorization": header})) == (401, "not_authenticated")


def test_a_key_comes_as_bearer_or_in_the_url(guarded: RunningGateway, new_key: MakeKey) -> None:
    token = new_key("read")
    assert guarded.get("/v1/queues", key=token).status_code == 200
    for auth in (("user", token), (token, "")):
        assert guarded.get("/v1/queues", auth=auth).status_code == 200
    damaged = token[:-1] + ("A" if token[-1] != "A" else "B")
    assert problem(guarded.get("/v1/queues", key=damaged)) == (401, "not_authenticated")


# Scopes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scopes", "may"),
    [
        (("submit",), {"submit"}),
        (("read",), {"look", "queues"}),
        (("submit", "read"), {"submit", "look", "queues", "cancel"}),
        (("read_all",), {"look", "queues", "workers", "metrics"}),
        (("admin",), {"submit", "look", "queues", "workers", "metrics", "cancel"}),
    ],
)
def test_a_scope_allows_what_it_says(
    guarded: RunningGateway, new_key: MakeKey, scopes: tuple[str, ...], may: set[str]
) -> None:
    token = new_key(*scopes)
    answers = {
        "submit": submit(guarded, key=token, name="mine"),
        "look": guarded.get("/v1/decodes", key=token),
        "queues": guarded.get("/v1/queues", key=token),
        "workers": guarded.get("/v1/workers", key=token),
        "metrics": guarded.get("/metrics", key=token),
        "cancel": guarded.post("/v1/decodes/mine/cancel", key=token),
    }
    for name, answer in answers.items():
        if name in may:
            assert answer.ok, (name, answer.text)
        else:
            assert problem(answer)[0] in (403, 404), name


# Whose ----------------------------------------------------------------------------------------------------------


def test_two_keys_use_one_id_for_two_jobs(guarded: RunningGateway, new_key: MakeKey) -> None:
    one, other = new_key("submit", "read"), new_key("submit", "read")
    assert submit(guarded, key=one, name="cat").status_code == 202
    again = submit(guarded, key=other, name="cat", output="jpg")  # no conflict: it cannot tell that there is another
    assert (again.status_code, again.json()["id"]) == (202, "cat")
    assert [guarded.get("/v1/decodes/cat", key=key).json()["output"] for key in (one, other)] == ["png", "jpg"]


def test_a_job_is_nobody_elses_in_any_view(guarded: RunningGateway, new_key: MakeKey, worker: StoreWorker) -> None:
    owner, stranger = new_key("submit", "read"), new_key("submit", "read")
    submit(guarded, key=owner, name="secret")
    worker.succeed(worker.claim_one())
    key_id = owner.split("_")[1]
    for name in ("secret", f"k_{key_id}_secret"):
        for method, path in (
            ("GET", ""), ("GET", "/output/0"), ("GET", "/output"), ("GET", "/events"), ("POST", "/cancel"),
            ("POST", "/redecode"), ("DELETE", ""),
        ):  # fmt: skip
            assert problem(guarded.ask(method, f"/v1/decodes/{name}{path}", key=stranger)) == (404, "job_not_found"), (
                path
            )
        assert problem(guarded.get(f"/decode/sd/jobs/{name}", key=stranger)) == (404, "job_not_found")
    assert guarded.get("/v1/decodes", key=stranger).json()["jobs"] == []
    seen = guarded.get("/v1/overview", key=stranger).json()
    assert (seen["recent"], seen["failed"], seen["workers"]) == ([], [], None)
    assert guarded.get("/v1/decodes/secret/output", key=owner).content == b"picture"
    assert [job["id"] for job in guarded.get("/v1/decodes", key=owner).json()["jobs"]] == ["secret"]


def test_one_that_sees_all_sees_all_and_changes_nothing(
    guarded: RunningGateway, new_key: MakeKey, worker: StoreWorker
) -> None:
    owner, auditor, boss = new_key("submit", "read"), new_key("read_all"), new_key("admin")
    submit(guarded, key=owner, name="cat")
    name = f"k_{owner.split('_')[1]}_cat"
    for key in (auditor, boss):
        assert [job["id"] for job in guarded.get("/v1/decodes", key=key).json()["jobs"]] == [name]
        assert guarded.get(f"/v1/decodes/{name}", key=key).json()["id"] == name
    assert problem(guarded.post(f"/v1/decodes/{name}/cancel", key=auditor)) == (403, "not_allowed")
    assert guarded.post(f"/v1/decodes/{name}/cancel", key=boss).json()["status"] == "canceled"
    assert guarded.get("/v1/decodes/cat", key=owner).json()["status"] == "canceled"


def test_an_id_of_any_length_is_the_same_job_again(guarded: RunningGateway, new_key: MakeKey) -> None:
    token = new_key("submit", "read")
    name = "x" * 64
    assert submit(guarded, key=token, name=name).status_code == 202
    assert submit(guarded, key=token, name=name).status_code == 200
    assert guarded.get(f"/v1/decodes/{name}", key=token).status_code == 200
    other = new_key("submit", "read")
    assert problem(submit(guarded, key=other, name=f"k_{token.split('_')[1]}_cat")) == (422, "invalid_option")


def test_errors_name_a_job_as_its_key_does(guarded: RunningGateway, new_key: MakeKey) -> None:
    token = new_key("submit", "read")
    submit(guarded, key=token, name="cat")
    conflict = submit(guarded, key=token, name="cat", output="jpg")
    assert problem(conflict) == (409, "job_conflict")
    assert conflict.json()["job_id"] == "cat"
    assert "k_" not in conflict.text


def test_watching_is_for_the_owner(guarded: RunningGateway, new_key: MakeKey, worker: StoreWorker) -> None:
    token = new_key("submit", "read")
    submit(guarded, key=token, name="cat")
    worker.succeed(worker.claim_one())
    url = guarded.url
    guarded.url = url.replace("http://", f"http://user:{token}@")
    try:
        (event,) = stream(guarded, "/v1/decodes/cat/events")
    finally:
        guarded.url = url
    assert (event[0], event[1]["id"]) == ("succeeded", "cat")


# For how long ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/overview/events", "/v1/decodes/cat/events"])
def test_a_stream_ends_with_its_key(guarded: RunningGateway, new_key: MakeKey, path: str) -> None:
    token = new_key("submit", "read")
    submit(guarded, key=token, name="cat")
    with requests.get(
        guarded.url + path, headers={"Authorization": f"Bearer {token}"}, stream=True, timeout=30
    ) as answer:
        lines = answer.iter_lines()
        assert any(line.startswith(b"event: ") for line in lines)
        guarded.parts.keys.revoke(token.split("_")[1])
        wait_until(lambda: not guarded.parts.streams.open, what="the stream to end")


def test_a_stream_ends_with_its_session(guarded: RunningGateway, new_key: MakeKey) -> None:
    with requests.Session() as browser:
        csrf = browser.post(f"{guarded.url}/session", json={"token": new_key("read")}, timeout=30).json()["csrf"]
        with browser.get(f"{guarded.url}/v1/overview/events", stream=True, timeout=30) as answer:
            lines = answer.iter_lines()
            assert any(line.startswith(b"event: ") for line in lines)
            cookies = {name: value or "" for name, value in browser.cookies.items()}
            requests.delete(f"{guarded.url}/session", cookies=cookies, headers={"X-CSRF-Token": csrf}, timeout=30)
            wait_until(lambda: not guarded.parts.streams.open, what="the stream to end")


# Rates and quotas -----------------------------------------------------------------------------------------------


def test_a_key_that_asks_too_often_is_told_when_to_come_back(
    gateways: Callable[..., RunningGateway], new_key: MakeKey
) -> None:
    one, other = gateways(auth="required"), gateways(auth="required")  # counted over all gateways
    token, another = new_key("submit", rate_per_min=1), new_key("submit", rate_per_min=1)
    answers = [submit(gateway, key=token) for gateway in (one, other) * 4]
    assert [answer.status_code for answer in answers] == [202] * 5 + [429] * 3
    assert problem(answers[-1]) == (429, "rate_limited")
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 61
    assert submit(one, key=another).status_code == 202


def test_a_key_has_its_jobs_of_the_day(guarded: RunningGateway, new_key: MakeKey) -> None:
    token = new_key("submit", jobs_per_day=2)
    answers = [submit(guarded, key=token) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert problem(answers[-1]) == (429, "quota_exceeded")
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 86_400
    posted = guarded.post("/v1/decodes?vae=sd", data=safetensors(), headers=SAFETENSORS)
    assert problem(posted) == (401, "not_authenticated")
