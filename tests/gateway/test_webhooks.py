"""Webhooks over HTTP: options of a submit, deliveries and what can be done with them, secrets that never come out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import redis
import requests

from broker_config import keys, webhook_deliveries
from broker_config.connection import connect_url
from broker_config.settings import Settings
from broker_config.webhook_secrets import WebhookSecrets, new_secret
from producer.gateway.openapi import document
from tests.gateway.conftest import SAFETENSORS, SECRET, WEBHOOKS, problem, safetensors
from tests.gateway.test_job_api import submit
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.told_courier import ToldCourier

HOOK = "https://hooks.example/latentq?token=t0p"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With webhooks."""
    return settings.model_copy(update=WEBHOOKS)


def with_options(gateway: RunningGateway, key: str | None = None, **options: Any) -> requests.Response:
    """A submit with its options in a part of their own."""
    parts = [
        ("options", (None, json.dumps({"vae": "sd"} | options), "application/json")),
        ("latents", ("l", safetensors())),
    ]
    return gateway.post("/v1/decodes", key=key, files=parts)


@pytest.fixture
def dead(
    guarded: RunningGateway, new_key: Callable[..., str], worker: StoreWorker, courier: ToldCourier
) -> tuple[str, str]:
    """A dead letter of a key: the key, and the delivery's id."""
    key = new_key("submit", "read", name="owner")
    assert with_options(guarded, key, job_id="cat", webhook=HOOK, webhook_secret=SECRET).status_code == 202
    worker.succeed(worker.claim_one())
    (delivery,) = courier.work()
    return key, delivery


# Submit -----------------------------------------------------------------------------------------------------------


def test_a_job_may_have_a_webhook_in_its_options_or_in_the_query(
    gateway: RunningGateway, worker: StoreWorker, courier: ToldCourier
) -> None:
    options: dict[str, Any] = {"webhook": HOOK, "webhook_events": ["processing", "failed"], "webhook_inline": True}
    assert with_options(gateway, job_id="a", **options, webhook_secret=SECRET).status_code == 202
    assert gateway.post("/v1/webhook-secrets", json={"secret": new_secret()}).status_code == 201
    asked = {"webhook": "http://receiver:8080/x", "webhook_events": "queued,succeeded", "webhook_inline": "true"}
    assert submit(gateway, name="b", **asked).status_code == 202
    for claim in worker.claim(max_jobs=1) + worker.claim(max_jobs=1):
        worker.fail(claim)
    assert sorted(courier.work("delivered", status=200)) == ["msg_a_failed", "msg_a_processing", "msg_b_queued"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"webhook": "https://10.0.0.1/"}, "webhook_address_refused"),
        ({"webhook": "http://hooks.example/"}, "webhook_url_refused"),
        ({"webhook": "https://localhost/"}, "webhook_url_refused"),
        ({"webhook": HOOK}, "webhook_secret_missing"),
        ({"webhook": HOOK, "webhook_secret": SECRET, "webhook_events": ["tomorrow"]}, "invalid_option"),
        ({"webhook": HOOK, "webhook_secret": SECRET, "webhook_events": {"failed": 1}}, "invalid_option"),
        ({"webhook": HOOK, "webhook_secret": SECRET, "webhook_inline": "yes"}, "invalid_option"),
        ({"webhook": HOOK, "webhook_secret": "whsec_dG9vIHNob3J0"}, "invalid_option"),
        ({"webhook": HOOK, "webhook_secret": [SECRET]}, "invalid_option"),
        ({"webhook_events": ["failed"]}, "invalid_option"),
    ],
)
def test_a_webhook_that_cannot_be_is_refused(gateway: RunningGateway, options: dict[str, Any], code: str) -> None:
    answer = with_options(gateway, **options)
    assert problem(answer) == (422, code)
    assert "t0p" not in answer.text
    assert SECRET not in answer.text
    assert "dG9vIHNob3J0" not in answer.text


def test_a_secret_is_never_taken_from_a_url(gateway: RunningGateway) -> None:
    answer = submit(gateway, webhook=HOOK, webhook_secret=SECRET)
    assert problem(answer) == (422, "invalid_option")
    assert SECRET not in answer.text
    operation = document()["paths"]["/v1/decodes"]["post"]
    assert "webhook" in {item["name"] for item in operation["parameters"]}
    assert "webhook_secret" not in {item["name"] for item in operation["parameters"]}


def test_diffusers_calls_may_have_a_webhook_and_their_result_stays_for_it(
    gateways: Callable[..., RunningGateway], worker: StoreWorker, courier: ToldCourier
) -> None:
    gateway = gateways(wait_s=0.05)
    gateway.post("/v1/webhook-secrets", json={"secret": SECRET})
    query = {"shape": [1, 4, 2, 2], "dtype": "float32", "webhook": HOOK}
    answer = gateway.post("/decode/sd", params=query, data=b"\0" * 64, allow_redirects=False)
    assert answer.status_code == 303, answer.text
    claim = worker.claim_one()
    assert worker.request(claim).retention_s >= 86_400
    worker.succeed(claim)
    assert courier.work("delivered", status=200) == [f"msg_{claim.job_id}_succeeded"]


# Deliveries -------------------------------------------------------------------------------------------------------


def test_the_owner_sees_its_dead_letters_with_every_attempt(guarded: RunningGateway, dead: tuple[str, str]) -> None:
    key, name = dead
    page = guarded.get("/v1/webhooks", key=key)
    assert page.headers["Cache-Control"] == "no-store"
    (listed,) = page.json()["deliveries"]
    shown = guarded.get(f"/v1/webhooks/{name}", key=key).json()
    assert shown == listed
    assert (shown["id"], shown["event"], shown["state"], shown["job_id"]) == (name, "succeeded", "dead", "cat")
    assert (shown["url"], shown["receiver"]) == (HOOK, "https://hooks.example")
    (attempt,) = shown["attempts"]
    assert (attempt["status"], attempt["duration_ms"], attempt["error"]) == (500, 12, "status 500")
    assert shown["reason"]
    assert guarded.get("/v1/webhooks?state=pending", key=key).json() == {"deliveries": [], "next_cursor": None}


def test_another_key_sees_and_changes_nothing_of_it(
    guarded: RunningGateway, dead: tuple[str, str], new_key: Callable[..., str]
) -> None:
    _, name = dead
    other = new_key("submit", "read", name="other")
    assert guarded.get("/v1/webhooks", key=other).json()["deliveries"] == []
    for method, path in (("GET", name), ("POST", f"{name}/redeliver"), ("POST", f"{name}/enable")):
        assert problem(guarded.ask(method, f"/v1/webhooks/{path}", key=other)) == (404, "delivery_not_found")
    assert problem(guarded.get("/v1/webhooks"))[0] == 401
    assert problem(guarded.get("/v1/webhooks", key=new_key("submit"))) == (403, "not_allowed")


def test_who_sees_all_sees_it_without_the_receivers_secrets_and_only_an_admin_changes_it(
    guarded: RunningGateway, dead: tuple[str, str], new_key: Callable[..., str]
) -> None:
    key, name = dead
    watcher, admin = new_key("read_all", "submit"), new_key("admin")
    answer = guarded.get(f"/v1/webhooks/{name}", key=watcher)
    assert (answer.json()["url"], answer.json()["receiver"]) == (None, "https://hooks.example")
    assert "t0p" not in answer.text + guarded.get("/v1/webhooks", key=watcher).text
    assert problem(guarded.post(f"/v1/webhooks/{name}/redeliver", key=watcher)) == (403, "not_allowed")
    assert guarded.post(f"/v1/webhooks/{name}/redeliver", key=admin).status_code == 202
    assert guarded.get("/v1/webhooks?state=pending", key=key).json()["deliveries"][0]["id"] == name


def test_a_dead_letter_is_sent_again_under_its_id(
    guarded: RunningGateway, dead: tuple[str, str], courier: ToldCourier
) -> None:
    key, name = dead
    answer = guarded.post(f"/v1/webhooks/{name}/redeliver", key=key)
    assert (answer.status_code, answer.json()["state"], answer.json()["ended_at"]) == (202, "pending", None)
    assert guarded.post(f"/v1/webhooks/{name}/redeliver", key=key).status_code == 200, "it is on its way already"
    assert courier.work("delivered", status=200) == [name]
    shown = guarded.get(f"/v1/webhooks/{name}", key=key).json()
    assert (shown["state"], len(shown["attempts"])) == ("delivered", 2)
    assert guarded.get("/v1/webhooks", key=key).json()["deliveries"] == []


def test_an_endpoint_that_answered_410_is_called_again_once_it_is_enabled(
    guarded: RunningGateway, dead: tuple[str, str], courier: ToldCourier
) -> None:
    key, name = dead
    guarded.post(f"/v1/webhooks/{name}/redeliver", key=key)
    courier.work("stopped", status=410)
    guarded.post(f"/v1/webhooks/{name}/redeliver", key=key)
    assert courier.work() == [], "it is not called"
    assert "410" in guarded.get(f"/v1/webhooks/{name}", key=key).json()["reason"]
    assert guarded.post(f"/v1/webhooks/{name}/enable", key=key).status_code == 200
    guarded.post(f"/v1/webhooks/{name}/redeliver", key=key)
    assert courier.work("delivered", status=200) == [name]


def test_dead_letters_come_in_pages(
    guarded: RunningGateway, new_key: Callable[..., str], worker: StoreWorker, courier: ToldCourier
) -> None:
    mine, other = new_key("submit", "read", "read_all"), new_key("submit", "read")
    for number in range(3):
        for key in (mine, other):
            with_options(guarded, key, job_id=f"j{number}", webhook=HOOK, webhook_secret=SECRET)
            worker.succeed(worker.claim_one())
            courier.work()
    for key, expected in ((mine, 6), (other, 3)):
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while len(seen) <= expected:
            page = guarded.get("/v1/webhooks", key=key, params={"limit": "2"} | cursor).json()
            seen += [item["id"] for item in page["deliveries"]]
            if page["next_cursor"] is None:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert len(seen) == len(set(seen)) == expected
    for query in ("limit=0", "limit=201", "state=lost", "cursor=x", "colour=red"):
        assert problem(guarded.get(f"/v1/webhooks?{query}", key=mine)) == (422, "invalid_option")


def test_a_page_goes_on_among_deliveries_of_others_and_of_one_millisecond_and_names_none_of_them(
    guarded: RunningGateway,
    new_key: Callable[..., str],
    worker: StoreWorker,
    courier: ToldCourier,
    admin: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine, other = new_key("submit", "read"), new_key("submit", "read")
    for number in range(5):
        for key in (mine, other):
            with_options(guarded, key, job_id=f"j{number}", webhook=HOOK, webhook_secret=SECRET)
        for claim in worker.claim(max_jobs=1) + worker.claim(max_jobs=1):
            worker.succeed(claim)
        courier.work()
    scores: Any = admin.zrange(keys.DEAD_LETTERS, 0, -1, withscores=True)
    assert len(scores) == 10
    admin.zadd(keys.DEAD_LETTERS, {name: scores[0][1] + rank // 4 for rank, (name, _) in enumerate(scores)})
    monkeypatch.setattr(webhook_deliveries, "_CHUNK", 2)
    monkeypatch.setattr(webhook_deliveries, "_LOOKED_AT", 4)
    seen, cursor = [], ""
    while True:
        page = guarded.get(f"/v1/webhooks?limit=2{cursor}", key=mine).json()
        seen += [item["id"] for item in page["deliveries"]]
        if page["next_cursor"] is None:
            break
        assert re.fullmatch(r"\d+-\d+", page["next_cursor"])
        cursor = f"&cursor={page['next_cursor']}"
    listed: Any = admin.zrange(keys.DEAD_LETTERS, 0, -1, desc=True)
    names = [name.decode() for name in listed]
    assert seen == [name for name in names if mine[3:11] in name]
    assert len(seen) == 5
    foreign = next(name for name in names if mine[3:11] not in name)
    for name in (foreign, "msg_nobody_succeeded"):  # the one is there, the other is not
        assert problem(guarded.get(f"/v1/webhooks?cursor={name}", key=mine)) == (422, "invalid_option")


def test_the_deliveries_of_one_job_are_listed_whatever_became_of_them(
    guarded: RunningGateway, dead: tuple[str, str], new_key: Callable[..., str], courier: ToldCourier
) -> None:
    key, name = dead
    guarded.post(f"/v1/webhooks/{name}/redeliver", key=key)
    courier.work("delivered", status=200)
    (listed,) = guarded.get("/v1/webhooks?job=cat", key=key).json()["deliveries"]
    assert (listed["id"], listed["state"]) == (name, "delivered")
    assert problem(guarded.get("/v1/webhooks?job=cat", key=new_key("read"))) == (404, "job_not_found")
    assert problem(guarded.get("/v1/webhooks?job=cat&limit=5", key=key)) == (422, "invalid_option")


@pytest.mark.parametrize("name", ["nobody", "msg_nobody_succeeded", "msg_..", "%00", "msg_" + "a" * 200])
def test_a_delivery_that_is_none_is_not_found(gateway: RunningGateway, name: str) -> None:
    for method, path in (("GET", name), ("POST", f"{name}/redeliver"), ("POST", f"{name}/enable")):
        assert problem(gateway.ask(method, f"/v1/webhooks/{path}")) == (404, "delivery_not_found")


# Ping -------------------------------------------------------------------------------------------------------------


def test_a_ping_is_sent_once_and_belongs_to_its_key(
    guarded: RunningGateway, new_key: Callable[..., str], courier: ToldCourier
) -> None:
    key, other = new_key("submit", "read"), new_key("submit", "read")
    assert problem(guarded.post("/v1/webhooks/ping", key=key, json={"url": HOOK})) == (422, "webhook_secret_missing")
    guarded.post("/v1/webhook-secrets", key=key, json={"secret": SECRET})
    answer = guarded.post("/v1/webhooks/ping", key=key, json={"url": HOOK})
    assert (answer.status_code, answer.json()["event"], answer.json()["job_id"]) == (202, "ping", None)
    assert courier.work("delivered", status=204) == [answer.json()["id"]]
    assert guarded.get(answer.headers["Location"], key=key).json()["state"] == "delivered"
    assert problem(guarded.get(answer.headers["Location"], key=other)) == (404, "delivery_not_found")


def test_a_ping_goes_where_a_webhook_may_go_and_counts_as_a_submit(
    guarded: RunningGateway, new_key: Callable[..., str]
) -> None:
    key = new_key("submit", "read", rate_per_min=1)
    guarded.post("/v1/webhook-secrets", key=key, json={"secret": SECRET})
    answer = guarded.post("/v1/webhooks/ping", key=key, json={"url": "https://169.254.169.254/latest"})
    assert problem(answer) == (422, "webhook_address_refused")
    assert answer.json()["field"] == "url"
    answers = [guarded.post("/v1/webhooks/ping", key=key, json={"url": HOOK}).status_code for _ in range(6)]
    assert answers == [202] * 5 + [429]
    bodies: list[Any] = [{}, [], {"url": 7}, {"uri": HOOK}]
    for body in bodies:
        assert problem(guarded.post("/v1/webhooks/ping", key=key, json=body)) == (400, "bad_request")
    assert problem(guarded.post("/v1/webhooks/ping", key=new_key("read"), json={"url": HOOK}))[0] == 403


# Secrets ----------------------------------------------------------------------------------------------------------


def test_a_secret_may_stay_for_a_year(gateway: RunningGateway) -> None:
    for _ in range(2):
        answer = gateway.post("/v1/webhook-secrets", json={"secret": new_secret(), "overlap_s": 31_536_000})
        assert answer.status_code == 201, answer.text
    newer, older = gateway.get("/v1/webhook-secrets").json()["secrets"]
    assert (newer["valid_until"], older["valid_until"] is None) == (None, False)
    schema = document()["paths"]["/v1/webhook-secrets"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["overlap_s"]["maximum"] == 31_536_000


def test_a_secret_goes_in_and_never_comes_out(
    guarded: RunningGateway, new_key: Callable[..., str], broker_url: str, admin: redis.Redis
) -> None:
    key, other = new_key("submit", "read"), new_key("submit", "read")
    made = guarded.post("/v1/webhook-secrets", key=key, json={"secret": SECRET})
    newer = guarded.post("/v1/webhook-secrets", key=key, json={"secret": new_secret(), "overlap_s": 60})
    listed = guarded.get("/v1/webhook-secrets", key=key)
    assert [item["id"] for item in listed.json()["secrets"]] == [newer.json()["id"], made.json()["id"]]
    assert [item["valid_until"] is None for item in listed.json()["secrets"]] == [True, False]
    assert SECRET not in made.text + newer.text + listed.text
    assert guarded.get("/v1/webhook-secrets", key=other).json() == {"secrets": []}
    owner = f"key:{key[3:11]}"
    assert admin.pttl(keys.webhook_secret(owner)) > 0

    connections = connect_url(broker_url, name="latentq-test")
    assert [item.secret for item in WebhookSecrets(connections).of(owner)][1] == SECRET
    connections.close()
    assert guarded.ask("DELETE", f"/v1/webhook-secrets/{made.json()['id']}", key=other).status_code == 204
    assert len(guarded.get("/v1/webhook-secrets", key=key).json()["secrets"]) == 2, "another's is not touched"
    assert guarded.ask("DELETE", f"/v1/webhook-secrets/{made.json()['id']}", key=key).status_code == 204
    assert len(guarded.get("/v1/webhook-secrets", key=key).json()["secrets"]) == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"secret": "hunter2-hunter2"}, (422, "invalid_option")),
        ({"secret": SECRET, "overlap_s": -1}, (422, "invalid_option")),
        ({"secret": SECRET, "overlap_s": "soon"}, (422, "invalid_option")),
        ({"secret": SECRET, "overlap_s": 31_536_001}, (422, "invalid_option")),
        ({"secret": SECRET, "overlap_s": 1e308}, (422, "invalid_option")),
        ({"secret": SECRET, "overlap_s": 10**400}, (422, "invalid_option")),
        ({"secret": 7}, (400, "bad_request")),
        ({}, (400, "bad_request")),
    ],
)
def test_a_secret_that_is_none_is_refused_and_not_repeated(
    gateway: RunningGateway, body: dict[str, Any], expected: tuple[int, str]
) -> None:
    answer = gateway.post("/v1/webhook-secrets", json=body)
    assert problem(answer) == expected
    assert "hunter2" not in answer.text
    assert problem(gateway.post("/v1/webhook-secrets", data=b"{", headers=SAFETENSORS)) == (400, "bad_request")
