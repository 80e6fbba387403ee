"""A key's list however old, its quota however often it asks, and what a client learns when the broker goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import requests
from pydantic import SecretStr

from broker_config import keys
from broker_config.errors import BrokerUnreachable
from broker_config.settings import Settings
from producer.submit_attempt import SubmitAttempt
from tests.gateway.conftest import SAFETENSORS, problem, safetensors
from tests.gateway.test_job_api import stream, submit
from tests.support.faulty_proxy import FaultyProxy
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

MakeKey = Callable[..., str]
DAY_MS = 86_400_000


def key_id(token: str) -> str:
    return token.split("_")[1]


# Lists ----------------------------------------------------------------------------------------------------------


def leave_entries(admin: redis.Redis, token: str, count: int, *, age_ms: int = 9 * DAY_MS) -> str:
    """Entries as jobs leave them whose tombstones are gone. Returns the list's key."""
    name, now = keys.index(key_id(token)), round(time.time() * 1000)
    admin.zadd(name, {f"k_{key_id(token)}_old{number}": now - age_ms - number for number in range(count)})
    admin.pexpire(name, DAY_MS)
    return name


@pytest.mark.parametrize("path", ["/v1/decodes?status=failed", "/v1/overview"])
def test_entries_without_a_job_cost_a_few_round_trips_once(
    guarded: RunningGateway, new_key: MakeKey, admin: redis.Redis, path: str
) -> None:
    token = new_key("submit", "read")
    for name in ("a", "b"):
        submit(guarded, key=token, name=name)
    name = leave_entries(admin, token, 900)
    before = admin.info("stats")["total_commands_processed"]
    answer = guarded.get(path, key=token)
    assert answer.status_code == 200
    # Two commands for each entry, and some forty for the rest; one at a time they were 200,000.
    assert admin.info("stats")["total_commands_processed"] - before < 2 * 900 + 300
    assert admin.zcard(name) == 2
    assert [job["id"] for job in guarded.get("/v1/decodes", key=token).json()["jobs"]] == ["b", "a"]


def test_an_entry_whose_job_may_be_under_way_stays(
    guarded: RunningGateway, new_key: MakeKey, admin: redis.Redis
) -> None:
    token = new_key("submit", "read")
    name = leave_entries(admin, token, 3, age_ms=60_000)
    assert guarded.get("/v1/decodes", key=token).json()["jobs"] == []
    assert admin.zcard(name) == 3


def test_a_page_among_dead_entries_goes_on_where_it_ended(
    guarded: RunningGateway, new_key: MakeKey, admin: redis.Redis
) -> None:
    token = new_key("submit", "read")
    for number in range(5):
        submit(guarded, key=token, name=f"job{number}")
    leave_entries(admin, token, 300, age_ms=7_200_000)
    found, cursor = [], ""
    while True:
        page = guarded.get(f"/v1/decodes?limit=2{cursor}", key=token).json()
        found += [job["id"] for job in page["jobs"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert found == [f"job{number}" for number in reversed(range(5))]


def test_a_refused_submit_leaves_no_entry(
    gateways: Callable[..., RunningGateway], settings: Settings, new_key: MakeKey, admin: redis.Redis
) -> None:
    gateway = gateways(settings.model_copy(update={"max_pending_jobs": 1}), auth="required")
    token = new_key("submit", "read")
    assert submit(gateway, key=token, name="one").status_code == 202
    for name in ("two", "three"):
        assert problem(submit(gateway, key=token, name=name)) == (503, "queue_full")
    assert problem(submit(gateway, key=token, name="one", output="jpg")) == (409, "job_conflict")
    assert admin.zrange(keys.index(key_id(token)), 0, -1) == [f"k_{key_id(token)}_one".encode()]


# Quotas ---------------------------------------------------------------------------------------------------------


def test_a_replay_costs_nothing_of_the_day(guarded: RunningGateway, new_key: MakeKey) -> None:
    token = new_key("submit", "read", jobs_per_day=2)
    assert [submit(guarded, key=token, name="same").status_code for _ in range(4)] == [202, 200, 200, 200]
    assert submit(guarded, key=token, name="other").status_code == 202
    assert submit(guarded, key=token, name="same").status_code == 200  # also when the day is used up
    assert problem(submit(guarded, key=token, name="third")) == (429, "quota_exceeded")


def test_a_refusal_costs_nothing_of_the_day(
    gateways: Callable[..., RunningGateway], settings: Settings, new_key: MakeKey
) -> None:
    gateway = gateways(settings.model_copy(update={"max_pending_jobs": 1}), auth="required")
    token = new_key("submit", "read", jobs_per_day=2)
    for _ in range(3):
        assert problem(submit(gateway, key=token, vae="nobody")) == (422, "unknown_vae")
    assert submit(gateway, key=token, name="one").status_code == 202
    for name in ("two", "three", "four"):
        assert problem(submit(gateway, key=token, name=name)) == (503, "queue_full")
    assert problem(submit(gateway, key=token, name="one", output="jpg")) == (409, "job_conflict")
    gateway.post("/v1/decodes/one/cancel", key=token)
    assert gateway.post("/v1/decodes/one/redecode", key=token).status_code == 202
    assert problem(gateway.post("/v1/decodes/one/redecode", key=token)) == (429, "quota_exceeded")


def test_what_is_accepted_counts_though_another_submit_under_its_id_was_refused_meanwhile(
    guarded: RunningGateway, new_key: MakeKey, admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = new_key("submit", "read", jobs_per_day=1)
    throttle = guarded.parts.throttle
    key = guarded.parts.keys.of_token(token)
    assert key is not None
    accept = SubmitAttempt.once

    def once(attempt: SubmitAttempt) -> bool:
        throttle.withdraw(key, attempt.job_id)  # what the refusal of the other one does
        return accept(attempt)

    with monkeypatch.context() as raced:
        raced.setattr(SubmitAttempt, "once", once)
        assert submit(guarded, key=token, name="one").status_code == 202
    assert problem(submit(guarded, key=token, name="two")) == (429, "quota_exceeded")
    assert [job["id"] for job in guarded.get("/v1/decodes", key=token).json()["jobs"]] == ["one"]


def test_a_job_that_is_accepted_after_midnight_is_one_of_the_day_before(
    guarded: RunningGateway, new_key: MakeKey, admin: redis.Redis
) -> None:
    token = new_key("submit", "read", jobs_per_day=1)
    assert submit(guarded, key=token, name="one").status_code == 202
    (today,) = admin.scan_iter(keys.quota(key_id(token), "*"))
    yesterday = keys.quota(key_id(token), str(int(today.rpartition(b":")[2]) - 1))
    admin.rename(today, yesterday)
    key = guarded.parts.keys.of_token(token)
    assert key is not None
    guarded.parts.throttle.enter(key, f"k_{key.id}_one", kept_s=60, accepted=True)
    assert submit(guarded, key=token, name="two").status_code == 202


def test_submits_at_once_do_not_pass_the_quota(guarded: RunningGateway, new_key: MakeKey) -> None:
    token = new_key("submit", "read", jobs_per_day=3)

    def post(_: int) -> int:
        headers = SAFETENSORS | {"Authorization": f"Bearer {token}"}
        return requests.post(
            f"{guarded.url}/v1/decodes?vae=sd", data=safetensors(), headers=headers, timeout=30
        ).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(post, range(8))) == [202] * 3 + [429] * 5


@pytest.mark.parametrize("script", ["spend", "enter"])
def test_a_lost_reply_of_the_broker_counts_once(
    gateways: Callable[..., RunningGateway], settings: Settings, broker_url: str, new_key: MakeKey, script: str
) -> None:
    with FaultyProxy(broker_url) as proxy:
        gateway = gateways(settings.model_copy(update={"redis_url": SecretStr(proxy.url)}), auth="required")
        token = new_key("submit", "read", jobs_per_day=2, rate_per_min=1)  # five at once
        assert submit(gateway, key=token, name="a").status_code == 202
        lost = gateway.parts.throttle._scripts[script].sha.encode()
        rule = proxy.swallow_reply(command="EVALSHA", argument=lost)
        assert submit(gateway, key=token, name="b").status_code == 202
        assert rule.struck
        codes = [problem(submit(gateway, key=token, name=name))[1] for name in ("c", "d")]
        assert codes == ["quota_exceeded", "quota_exceeded"]
        # Three more are let in at once by the rate: had the lost one counted twice, there were two.
        assert [submit(gateway, key=token, name="a").status_code for _ in range(4)] == [200, 200, 200, 429]


# When the broker, or a look, goes -------------------------------------------------------------------------------


def test_what_was_accepted_has_its_id_in_the_error(
    guarded: RunningGateway, new_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = new_key("submit", "read")

    def gone(job_id: str) -> None:
        raise BrokerUnreachable

    with monkeypatch.context() as broken:
        broken.setattr(guarded.parts.client.store, "snapshot", gone)
        answer = guarded.post("/v1/decodes?vae=sd", key=token, data=safetensors(), headers=SAFETENSORS)
    assert problem(answer) == (503, "broker_unreachable")
    name = answer.json()["job_id"]
    assert guarded.get(f"/v1/decodes/{name}", key=token).json()["status"] == "queued"


def test_a_look_that_breaks_ends_its_streams_and_later_ones_go_on(
    gateway: RunningGateway, worker: StoreWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(gateway, name="cat")
    events = stream(gateway, "/v1/decodes/cat/events")
    assert next(events)[0] == "queued"

    def odd(ids: object) -> None:
        raise ValueError("an odd record")

    with monkeypatch.context() as broken:
        broken.setattr(gateway.parts.client.store, "find", odd)
        wait_until(lambda: not gateway.parts.streams.open, what="the stream to end")
    worker.succeed(worker.claim_one())
    assert [kind for kind, _ in stream(gateway, "/v1/decodes/cat/events")] == ["succeeded"]
