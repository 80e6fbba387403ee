"""The job API: submit, wait, look, fetch, cancel, decode again, free, list, watch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.gateway.conftest import RAW, SAFETENSORS, latents, problem, safetensors
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until


def submit(
    gateway: RunningGateway, *, key: str | None = None, name: str | None = None, **options: str
) -> requests.Response:
    path = "/v1/decodes" if name is None else f"/v1/decodes/{name}"
    query = {"vae": "sd"} | options
    method = "POST" if name is None else "PUT"
    return gateway.ask(method, path, key=key, params=query, data=safetensors(), headers=SAFETENSORS)


# Submit ---------------------------------------------------------------------------------------------------------


def test_a_submit_is_accepted_with_where_to_look(gateway: RunningGateway) -> None:
    answer = submit(gateway, output="webp", metadata='{"prompt": "a fox"}', priority="high")
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["Location"] == f"/v1/decodes/{job['id']}" == job["urls"]["self"]
    assert int(answer.headers["Retry-After"]) >= 1
    assert (job["status"], job["output"], job["priority"], job["metadata"]) == (
        "queued",
        "webp",
        "high",
        {"prompt": "a fox"},
    )
    assert (job["height"], job["width"], job["layout"], job["position"]) == (16, 16, "unpacked", 0)
    assert job["served"] is False
    assert gateway.get(answer.headers["Location"]).json()["id"] == job["id"]


@pytest.mark.parametrize("form", ["raw", "safetensors", "multipart safetensors", "multipart raw", "octets"])
def test_every_form_of_a_body_is_the_same_job(gateway: RunningGateway, form: str) -> None:
    array = latents()
    query: dict[str, Any] = {"vae": "sd", "job_id": "mine"}
    assert gateway.post("/v1/decodes", params=query, data=safetensors(array), headers=SAFETENSORS).status_code == 202
    options = json.dumps({"vae": "sd", "job_id": "mine"})
    shape = {"shape": [1, 4, 2, 2], "dtype": "float32"}
    if form == "raw":
        again = gateway.post(
            "/v1/decodes", params=query | {"shape": "1,4,2,2", "dtype": "float32"}, data=array.tobytes(), headers=RAW
        )
    elif form == "safetensors":
        again = gateway.post("/v1/decodes", params=query, data=safetensors(array), headers=SAFETENSORS)
    elif form == "octets":
        again = gateway.post("/v1/decodes", params=query, data=safetensors(array), headers=RAW)
    elif form == "multipart safetensors":
        again = gateway.post(
            "/v1/decodes",
            files=[("options", (None, options, "application/json")), ("latents", ("l", safetensors(array)))],
        )
    else:
        told = json.dumps(json.loads(options) | shape)
        again = gateway.post("/v1/decodes", files=[("options", (None, told)), ("latents", ("l", array.tobytes()))])
    assert (again.status_code, again.json()["id"]) == (200, "mine")  # 200: it was there; other bytes would be 409


def test_the_same_put_is_the_same_job_and_another_is_a_conflict(gateway: RunningGateway) -> None:
    assert submit(gateway, name="cat").status_code == 202
    assert submit(gateway, name="cat").status_code == 200
    assert problem(submit(gateway, name="cat", output="jpg")) == (409, "job_conflict")
    assert problem(submit(gateway, name="cat", job_id="dog")) == (422, "invalid_option")


def test_prefer_wait_answers_with_the_finished_job(gateway: RunningGateway, worker: StoreWorker) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            gateway.post,
            "/v1/decodes",
            params={"vae": "sd"},
            data=safetensors(),
            headers=SAFETENSORS | {"Prefer": "respond-async, wait=20"},
        )
        worker.succeed(wait_until(worker.claim)[0])
        answer = waiting.result(timeout=30)
    assert (answer.status_code, answer.json()["status"]) == (201, "succeeded")
    assert answer.headers["Preference-Applied"] == "wait=20"
    assert "Retry-After" not in answer.headers


def test_a_batch_is_accepted_or_refused_one_by_one(gateway: RunningGateway) -> None:
    array = latents()
    jobs = [{"vae": "sd", "job_id": "a"}, {"vae": "nobody"}, {"vae": "sd", "shape": [1, 4, 2, 2], "dtype": "float32"}]
    files = [
        ("jobs", (None, json.dumps(jobs), "application/json")),
        ("one", ("1", safetensors(array))),
        ("two", ("2", safetensors(array))),
        ("three", ("3", array.tobytes())),
    ]
    answer = gateway.post("/v1/decodes/batch", files=files)
    assert answer.status_code == 200
    first, second, third = answer.json()["items"]
    assert (first["job"]["id"], first["error"]) == ("a", None)
    assert (second["job"], second["error"]["code"]) == (None, "unknown_vae")
    assert third["job"]["status"] == "queued"
    assert problem(gateway.post("/v1/decodes/batch", files=files[:3]))[0] == 400


# Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "headers", "body", "expected"),
    [
        ({}, SAFETENSORS, safetensors(), (422, "invalid_option")),
        ({"vae": "nobody"}, SAFETENSORS, safetensors(), (422, "unknown_vae")),
        ({"vae": "flux"}, SAFETENSORS, safetensors(), (422, "latents_channels")),
        ({"vae": "sd", "colour": "red"}, SAFETENSORS, safetensors(), (422, "invalid_option")),
        ({"vae": "sd", "height": "x"}, SAFETENSORS, safetensors(), (422, "invalid_option")),
        ({"vae": "sd", "metadata": "[1]"}, SAFETENSORS, safetensors(), (422, "invalid_option")),
        ({"vae": "sd", "job_id": "a b"}, SAFETENSORS, safetensors(), (422, "invalid_option")),
        ({"vae": "sd"}, SAFETENSORS, b"not a tensor, no", (415, "tensor_file_not_safetensors")),
        ({"vae": "sd"}, SAFETENSORS, safetensors()[:-1], (422, "tensor_file_truncated")),
        ({"vae": "sd"}, SAFETENSORS, safetensors() + b"!", (422, "tensor_file_oversized")),
        ({"vae": "sd"}, SAFETENSORS, b"", (422, "tensor_file_truncated")),
        ({"vae": "sd"}, {"Content-Type": "image/png"}, b"x", (415, "media_type_unsupported")),
        ({"vae": "sd", "shape": "1,4,2,2"}, RAW, b"x", (422, "invalid_option")),
        ({"vae": "sd", "shape": "1,4,2,2", "dtype": "float64"}, RAW, b"x", (422, "latents_dtype")),
        ({"vae": "sd", "shape": "1,4,2,2", "dtype": "float32"}, RAW, b"x" * 63, (422, "tensor_file_truncated")),
        ({"vae": "sd", "shape": "1,4,2,2", "dtype": "float32"}, RAW, b"\xff" * 64, (422, "latents_not_finite")),
        ({"vae": "sd", "shape": "1,-4", "dtype": "float32"}, RAW, b"x", (422, "invalid_option")),
        ({"vae": "sd"}, {"Content-Type": "multipart/form-data; boundary=x"}, b"nothing", (400, "bad_request")),
        ({"vae": "sd"}, {"Content-Type": "multipart/form-data"}, b"nothing", (400, "bad_request")),
    ],
)  # fmt: skip
def test_what_cannot_be_a_job_is_refused_with_its_code(
    gateway: RunningGateway, query: dict[str, str], headers: dict[str, str], body: bytes, expected: tuple[int, str]
) -> None:
    assert problem(gateway.post("/v1/decodes", params=query, data=body, headers=headers)) == expected
    assert gateway.get("/v1/decodes").json()["jobs"] == []


def test_what_there_is_not(gateway: RunningGateway) -> None:
    assert problem(gateway.get("/v1/decodes/nobody")) == (404, "job_not_found")
    assert problem(gateway.get("/v1/decodes/a%20b")) == (404, "job_not_found")
    assert problem(gateway.get("/v2")) == (404, "route_not_found")
    answer = gateway.ask("PATCH", "/v1/decodes")
    assert problem(answer) == (405, "method_not_allowed")
    assert answer.headers["Allow"] == "GET, HEAD, POST"


# Wait -----------------------------------------------------------------------------------------------------------


def test_a_long_poll_answers_when_the_job_ends_and_not_before(
    gateways: Callable[..., RunningGateway], worker: StoreWorker
) -> None:
    one, other = gateways(), gateways()  # any replica answers any poll
    url = submit(one).headers["Location"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.get, f"{url}?wait=20")
        wait_until(lambda: other.parts.client.feed._watches, what="the poll to wait")
        worker.succeed(worker.claim_one())
        assert waiting.result(timeout=10).json()["status"] == "succeeded"
    assert one.get(f"{url}?wait=20").json()["status"] == "succeeded"


def test_a_wait_ends_at_the_bound_with_the_job_as_it_is(gateways: Callable[..., RunningGateway]) -> None:
    gateway = gateways(wait_s=0.1)
    url = submit(gateway).headers["Location"]
    answer = gateway.get(f"{url}?wait=1000")
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    assert "Retry-After" in answer.headers
    assert problem(gateway.get(f"{url}?wait=-1")) == (422, "invalid_option")
    assert problem(gateway.get(f"{url}?wait=nan")) == (422, "invalid_option")


# Outputs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def done(gateway: RunningGateway, worker: StoreWorker) -> str:
    """URL of a job whose output is `picture`."""
    url = submit(gateway, name="done").headers["Location"]
    worker.succeed(worker.claim_one())
    return url


def test_an_output_has_type_length_and_digest(gateway: RunningGateway, done: str) -> None:
    told = gateway.get(done).json()["outputs"][0]
    for path in (told["url"], f"{done}/output"):
        answer = gateway.get(path)
        assert (answer.status_code, answer.content) == (200, b"picture")
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["Content-Length"] == "7"
        # printf picture | sha256sum
        digest = "2cea274d0bedc39ec4ab6ba9e59ec889e3ed6fb56a1cf088a64d9b383378dc97"
        assert (answer.headers["ETag"], told["sha256"]) == (f'"{digest}"', digest)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    head = gateway.ask("HEAD", told["url"])
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", "7")


def test_an_output_that_the_client_has_is_not_sent_again(gateway: RunningGateway, done: str) -> None:
    etag = gateway.get(f"{done}/output/0").headers["ETag"]
    answer = gateway.get(f"{done}/output/0", headers={"If-None-Match": f'"other", {etag}'})
    assert (answer.status_code, answer.content) == (304, b"")


@pytest.mark.parametrize(
    ("header", "status", "body", "range_"),
    [
        ("bytes=0-2", 206, b"pic", "bytes 0-2/7"),
        ("bytes=3-", 206, b"ture", "bytes 3-6/7"),
        ("bytes=-2", 206, b"re", "bytes 5-6/7"),
        ("bytes=5-100", 206, b"re", "bytes 5-6/7"),
        ("bytes=-100", 206, b"picture", "bytes 0-6/7"),
        ("bytes=2-1", 200, b"picture", None),
        ("bytes=0-1,3-4", 200, b"picture", None),
        ("pages=1-2", 200, b"picture", None),
        ("nonsense", 200, b"picture", None),
    ],
)
def test_ranges(gateway: RunningGateway, done: str, header: str, status: int, body: bytes, range_: str | None) -> None:
    answer = gateway.get(f"{done}/output/0", headers={"Range": header})
    assert (answer.status_code, answer.content, answer.headers.get("Content-Range")) == (status, body, range_)


def test_a_range_behind_the_end(gateway: RunningGateway, done: str) -> None:
    answer = gateway.get(f"{done}/output/0", headers={"Range": "bytes=7-"})
    assert problem(answer) == (416, "range_not_satisfiable")
    assert answer.headers["Content-Range"] == "bytes */7"
    stale = gateway.get(f"{done}/output/0", headers={"Range": "bytes=0-2", "If-Range": '"other"'})
    assert (stale.status_code, stale.content) == (200, b"picture")


def test_outputs_that_are_not_there(gateway: RunningGateway, done: str, worker: StoreWorker) -> None:
    assert problem(gateway.get(f"{done}/output/1")) == (404, "job_not_found")
    assert problem(gateway.get(f"{done}/output/-1")) == (404, "job_not_found")
    waits = submit(gateway).headers["Location"]
    assert problem(gateway.get(f"{waits}/output/0")) == (409, "job_not_finished")
    worker.fail(worker.claim_one())
    failed = gateway.get(f"{waits}/output/0")
    assert problem(failed) == (502, "job_failed")
    assert failed.json()["error_code"] == "decode_failed"


# Change ---------------------------------------------------------------------------------------------------------


def test_cancel_delete_and_what_is_left(gateway: RunningGateway) -> None:
    url = submit(gateway).headers["Location"]
    assert problem(gateway.ask("DELETE", url)) == (409, "job_not_finished")
    canceled = gateway.post(f"{url}/cancel")
    assert (canceled.status_code, canceled.json()["status"]) == (200, "canceled")
    assert gateway.ask("DELETE", url).status_code == 204
    assert gateway.get(url).json()["status"] == "expired"
    assert problem(gateway.get(f"{url}/output")) == (410, "result_expired")
    assert problem(gateway.post(f"{url}/redecode")) == (410, "result_expired")


def test_a_running_job_is_canceled_between_two_stages(gateway: RunningGateway, worker: StoreWorker) -> None:
    url = submit(gateway).headers["Location"]
    worker.claim_one()
    answer = gateway.post(f"{url}/cancel")
    assert (answer.status_code, answer.json()["cancel_requested"]) == (202, True)


def test_a_failed_job_is_decoded_again_with_other_options(gateway: RunningGateway, worker: StoreWorker) -> None:
    url = submit(gateway, name="first").headers["Location"]
    worker.fail(worker.claim_one())
    told = gateway.get(url).json()
    assert told["errors"][0]["code"] == "decode_failed"
    answer = gateway.post(f"{url}/redecode", data=json.dumps({"output": "jpg", "job_id": "second"}))
    assert (answer.status_code, answer.json()["output"], answer.json()["source_job_id"]) == (202, "jpg", "first")
    assert gateway.post(f"{url}/redecode?output=jpg&job_id=second").status_code == 200
    assert problem(gateway.post(f"{url}/redecode?vae=sdxl")) == (422, "invalid_option")
    assert problem(gateway.post(f"{url}/redecode", data=b"{")) == (400, "bad_request")


# List -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_key", [False, True], ids=["everyone's", "a key's own"])
def test_pages_have_every_job_once_newest_first(
    gateway: RunningGateway, new_key: Callable[..., str], worker: StoreWorker, with_key: bool
) -> None:
    key = new_key("submit", "read") if with_key else None
    for number in range(7):
        submit(gateway, name=f"job-{number}", key=key)
    worker.succeed(worker.claim_one())
    seen, cursor = [], None
    for _ in range(4):
        page = gateway.get("/v1/decodes", key=key, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert sorted(seen) == [f"job-{number}" for number in range(7)]
    times = [gateway.get(f"/v1/decodes/{name}", key=key).json()["created_at"] for name in seen]
    assert times == sorted(times, reverse=True)
    ended = gateway.get("/v1/decodes?status=succeeded", key=key).json()["jobs"]
    assert [job["id"] for job in ended] == ["job-0"]
    assert gateway.get("/v1/decodes?vae=flux", key=key).json()["jobs"] == []


def test_lists_of_nonsense(gateway: RunningGateway) -> None:
    for query in ("status=done", "limit=0", "limit=x", "cursor=x", "page=2", "status=failed&status=queued"):
        assert problem(gateway.get(f"/v1/decodes?{query}")) == (422, "invalid_option"), query


# Watch ----------------------------------------------------------------------------------------------------------


def stream(gateway: RunningGateway, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with requests.get(gateway.url + path, stream=True, timeout=30) as answer:
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "text/event-stream"
        event = ""
        for line in answer.iter_lines():
            name, _, value = line.decode().partition(": ")
            if name == "event":
                event = value
            elif name == "data":
                yield event, json.loads(value)


def test_events_tell_position_progress_and_the_end(gateway: RunningGateway, worker: StoreWorker) -> None:
    submit(gateway, name="before")
    submit(gateway, name="watched")
    events = stream(gateway, "/v1/decodes/watched/events")
    kind, job = next(events)
    assert (kind, job["position"]) == ("queued", 1)
    worker.succeed(worker.claim_one())
    assert next(events)[1]["position"] == 0
    claim = worker.claim_one()
    worker.renew(claim, stage="device", done=3, total=9)
    kind, job = next((kind, job) for kind, job in events if job["progress"])
    assert (kind, job["progress"]) == ("processing", {"done": 3, "total": 9})
    worker.succeed(claim)
    rest = list(events)
    assert (rest[-1][0], rest[-1][1]["outputs"][0]["size_bytes"]) == ("succeeded", 7)


def test_events_of_a_job_that_ended_are_its_end(gateway: RunningGateway, done: str) -> None:
    assert [kind for kind, _ in stream(gateway, f"{done}/events")] == ["succeeded"]


def test_the_overview_streams_what_changes(gateway: RunningGateway, worker: StoreWorker) -> None:
    events = stream(gateway, "/v1/overview/events")
    assert next(events)[1]["queues"] == []
    submit(gateway, name="one")
    assert next(events)[1]["queues"][0]["queued"] == 1
    worker.succeed(worker.claim_one())
    last = next(told for _, told in events if told["recent"])
    assert last["recent"][0]["id"] == "one"
    assert sum(point["succeeded"] for point in last["points"]) == 1


# Lists of other things ------------------------------------------------------------------------------------------


def test_vaes_queues_and_workers(gateway: RunningGateway, worker: StoreWorker) -> None:
    worker.store.serve(
        "box-1", ["sd"], ttl_s=60, report={"vaes": ["sd"], "device": "cuda:0", "busy_s": 3, "idle_s": 1, "jobs": 5}
    )
    submit(gateway)
    vaes = {vae["name"]: vae for vae in gateway.get("/v1/vaes").json()["vaes"]}
    assert (vaes["sd"]["served"], vaes["flux"]["served"], vaes["flux"]["layouts"]) == (
        True,
        False,
        ["packed", "unpacked"],
    )
    (queue,) = gateway.get("/v1/queues").json()["queues"]
    assert (queue["vae"], queue["queued"], queue["workers"]) == ("sd", 1, 1)
    (found,) = gateway.get("/v1/workers").json()["workers"]
    assert (found["name"], found["busy_share"], found["jobs"]) == ("box-1", 0.75, 5)


def test_many_requests_at_once_on_one_connection_each_get_their_own_answer(gateway: RunningGateway) -> None:
    names = [f"job-{number}" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: submit(gateway, name=name), names))
        found = list(pool.map(lambda name: gateway.get(f"/v1/decodes/{name}").json()["id"], names))
    assert found == names
