"""`/livez`, `/readyz`, `/metrics`, and what the broker counts for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from broker_config.job_record import JobSnapshot
from broker_config.settings import Settings
from broker_config.tally import BOUNDS_MS, Tallies
from tests.gateway.conftest import SECRET, WEBHOOKS, problem
from tests.gateway.test_job_api import stream, submit
from tests.support.faulty_proxy import FaultyProxy
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.told_courier import ToldCourier
from tests.support.wait import wait_until


def samples(gateway: RunningGateway, **options: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = gateway.get("/metrics", **options).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_alive_and_ready(gateway: RunningGateway) -> None:
    assert gateway.get("/livez").text == "alive\n"
    assert gateway.get("/readyz").json() == {"ready": True, "broker": "answers", "admission": "open"}


def test_without_its_broker_it_is_alive_and_not_ready(
    gateways: Callable[..., RunningGateway], settings: Settings, broker_url: str
) -> None:
    with FaultyProxy(broker_url) as proxy:
        gateway = gateways(settings.model_copy(update={"redis_url": SecretStr(proxy.url)}))
        assert gateway.get("/readyz").status_code == 200
        with proxy.refused():
            assert gateway.get("/livez").status_code == 200
            ready = gateway.get("/readyz")
            assert (ready.status_code, ready.json()["broker"]) == (503, "broker_unreachable")
            assert problem(gateway.get("/v1/decodes/x")) == (503, "broker_unreachable")
            assert problem(submit(gateway)) == (503, "broker_unreachable")
            assert samples(gateway)["latentq_broker_up", ()] == 0
        assert gateway.get("/readyz").status_code == 200


def test_a_stream_ends_with_the_broker_and_begins_again_with_it(
    gateways: Callable[..., RunningGateway], settings: Settings, broker_url: str
) -> None:
    with FaultyProxy(broker_url) as proxy:
        gateway = gateways(settings.model_copy(update={"redis_url": SecretStr(proxy.url)}))
        submit(gateway, name="cat")
        events = stream(gateway, "/v1/decodes/cat/events")
        page = stream(gateway, "/v1/overview/events")
        assert next(events)[0] == "queued"
        assert next(page)[0] == "overview"
        with proxy.refused():
            assert list(events) == []  # it ends as a stream ends, and is no second answer
            assert list(page) == []
        gateway.post("/v1/decodes/cat/cancel")
        assert [kind for kind, _ in stream(gateway, "/v1/decodes/cat/events")] == ["canceled"]


def test_many_watchers_share_their_looks(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"job-{number}" for number in range(30)]
    for name in names:
        submit(gateway, name=name)
    streams = [stream(gateway, f"/v1/decodes/{name}/events") for name in names]
    with ThreadPoolExecutor(30) as pool:
        assert {kind for kind, _ in pool.map(next, streams)} == {"queued"}
    looks: list[int] = []
    store = gateway.parts.client.store
    look = store.find

    def counted(ids: Sequence[str]) -> dict[str, JobSnapshot]:
        looks.append(len(ids))
        return look(ids)

    monkeypatch.setattr(store, "find", counted)
    wait_until(lambda: sum(looks) >= 90, what="three looks at each job")
    assert len(looks) < sum(looks) / 3, looks
    for name in names:
        gateway.post(f"/v1/decodes/{name}/cancel")
    for one in streams:
        assert [kind for kind, _ in one][-1] == "canceled"


def test_metrics_say_what_waits_what_ended_and_how_long_it_took(gateway: RunningGateway, worker: StoreWorker) -> None:
    for _ in range(4):
        submit(gateway)
    worker.succeed(worker.claim_one())  # its result says: decode 0.1 s
    worker.fail(worker.claim_one())
    worker.claim_one()
    found = samples(gateway)
    queue = (("priority", "normal"), ("vae", "sd"))
    assert found["latentq_queue_jobs", queue] == 1
    assert found["latentq_processing_jobs", queue] == 1
    assert found["latentq_failed_jobs", queue] == 1
    assert found["latentq_queue_oldest_seconds", queue] >= 0
    assert found["latentq_pending_jobs", ()] == 2
    assert found["latentq_pending_pixels", ()] == 2 * 16 * 16
    assert found["latentq_pending_latents_bytes", ()] > 2 * 64
    assert found["latentq_broker_memory_bytes", ()] > 0
    for outcome, count in (("succeeded", 1), ("failed", 1), ("canceled", 0)):
        assert found["latentq_jobs_ended_total", (("outcome", outcome), ("vae", "sd"))] == count
    below = {le: found["latentq_decode_seconds_bucket", (("le", le), ("vae", "sd"))] for le in ("0.05", "0.1", "+Inf")}
    assert below == {"0.05": 0, "0.1": 1, "+Inf": 1}
    assert found["latentq_decode_seconds_sum", (("vae", "sd"),)] == pytest.approx(0.1)
    assert found["latentq_wait_seconds_count", (("vae", "sd"),)] == 1
    route = (("method", "POST"), ("route", "/v1/decodes"), ("status", "202"))
    assert found["latentq_http_requests_total", route] == 4


def test_every_metric_is_in_the_docs(gateway: RunningGateway) -> None:
    page = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(gateway.get("/metrics").text)
    }
    families = {name.removesuffix("_created") for name in families}
    assert len(families) > 20
    assert {name for name in families if f"`{name}`" not in page} == set()


def test_webhooks_are_in_the_metrics(
    gateways: Callable[..., RunningGateway], settings: Settings, worker: StoreWorker, courier: ToldCourier
) -> None:
    gateway = gateways(settings.model_copy(update=WEBHOOKS))
    gateway.post("/v1/webhook-secrets", json={"secret": SECRET})
    for name, word in (("a", "delivered"), ("b", "failed"), ("c", "stopped"), ("d", None)):
        submit(gateway, name=name, webhook=f"https://{name}.example/")
        worker.succeed(worker.claim_one())
        if word is not None:
            courier.work(word)  # type: ignore[arg-type]
    found = samples(gateway)
    assert {
        name.removeprefix("latentq_"): value for (name, _), value in found.items() if "webhooks" in name and not _
    } == {
        "webhooks_pending": 1,
        "webhooks_overdue_seconds": found["latentq_webhooks_overdue_seconds", ()],
        "webhooks_dead_letters": 2,
        "webhooks_stopped_endpoints": 1,
    }
    assert found["latentq_webhooks_overdue_seconds", ()] > 0
    assert found["latentq_couriers", ()] == 1
    for outcome, count in (("delivered", 1), ("dead", 2), ("dropped", 0)):
        assert found["latentq_webhooks_ended_total", (("outcome", outcome),)] == count
    for outcome, count in (("good", 1), ("bad", 2)):
        assert found["latentq_webhook_attempts_total", (("outcome", outcome),)] == count


def test_paths_that_were_asked_for_are_no_labels(gateway: RunningGateway) -> None:
    for number in range(5):
        gateway.get(f"/nothing/{number}")
        gateway.get(f"/v1/decodes/job-{number}")
    text = gateway.get("/metrics").text
    assert "job-3" not in text
    assert "/nothing" not in text


def test_metrics_can_be_open_and_are_not_by_default(gateways: Callable[..., RunningGateway]) -> None:
    assert gateways(auth="required", open_metrics=False).get("/metrics").status_code == 401
    opened = gateways(auth="required", open_metrics=True)
    assert "latentq_queue_jobs" in opened.get("/metrics").text
    assert problem(opened.get("/v1/queues")) == (401, "not_authenticated")


def test_metrics_are_for_who_may_see_all(guarded: RunningGateway, new_key: Callable[..., str]) -> None:
    assert problem(guarded.get("/metrics", key=new_key("read"))) == (403, "not_allowed")
    assert guarded.get("/metrics", key=new_key("read_all")).status_code == 200


def test_it_is_not_ready_while_the_brokers_memory_is_full(
    gateways: Callable[..., RunningGateway], settings: Settings
) -> None:
    gateway = gateways(settings.model_copy(update={"memory_watermark": 1e-6}))
    assert problem(submit(gateway)) == (503, "queue_full")
    ready = gateway.get("/readyz")
    assert (ready.status_code, ready.json()["admission"]) == (503, "memory_full")


def test_where_the_broker_is_stays_in_the_log(
    gateways: Callable[..., RunningGateway], settings: Settings, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyProxy(broker_url) as proxy:
        gateway = gateways(settings.model_copy(update={"redis_url": SecretStr(proxy.url)}), auth="required")
        with proxy.refused():
            answer = gateway.post("/session", json={"token": "lq_aaaaaaaa_" + "A" * 43})
    assert problem(answer) == (503, "broker_unreachable")
    port = proxy.url.rpartition(":")[2].partition("/")[0]
    assert port not in answer.text
    assert "LATENTQ" not in answer.text
    assert any(
        port in record.getMessage() for record in caplog.records if vars(record).get("action") == "request_unserved"
    )


def test_the_lua_bounds_are_those_of_the_histograms(gateway: RunningGateway) -> None:
    from broker_config.scripts import source

    line = next(line for line in source("complete").splitlines() if line.startswith("local BOUNDS_MS"))
    assert tuple(int(item) for item in line.partition("{")[2].strip(" }").split(",")) == BOUNDS_MS


def test_the_counts_of_a_quarter_of_a_minute(gateway: RunningGateway, worker: StoreWorker) -> None:
    submit(gateway)
    worker.succeed(worker.claim_one())
    pulses = Tallies(worker.store.connections).pulses(minutes=15)
    assert len(pulses) == 60
    assert [pulse.from_ms for pulse in pulses] == list(range(pulses[0].from_ms, pulses[-1].from_ms + 1, 15_000))
    assert sum(pulse.outcomes["succeeded"] for pulse in pulses) == 1
    (pulse,) = [pulse for pulse in pulses if pulse.outcomes["succeeded"]]
    assert pulse.mean_s["decode"] == pytest.approx(0.1)
    assert pulse.mean_s["encode"] == 0
