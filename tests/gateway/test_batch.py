"""A batch gets what single submits get: the same refusals, under the client's own names, and no more time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import requests

from producer.submit_attempt import SubmitAttempt
from tests.gateway.conftest import latents, problem, safetensors
from tests.gateway.test_limits import answer_of, connection
from tests.support.gateways import RunningGateway
from tests.support.wait import wait_until

Gateways = Callable[..., RunningGateway]
RAW_UNKNOWN = {"vae": "nobody", "shape": [1, 4, 2, 2], "dtype": "float32"}
MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


def batch(gateway: RunningGateway, *jobs: dict[str, Any], key: str | None = None) -> requests.Response:
    files = [("jobs", (None, json.dumps(jobs))), *(("latents", (str(n), safetensors())) for n in range(len(jobs)))]
    return gateway.post("/v1/decodes/batch", files=files, key=key)


def begun(*jobs: dict[str, Any]) -> bytes:
    """A body up to the first latents, a few of which follow."""
    return (
        f'--x\r\nContent-Disposition: form-data; name="jobs"\r\n\r\n{json.dumps(jobs)}\r\n'
        '--x\r\nContent-Disposition: form-data; name="l"\r\n\r\n'
    ).encode() + b"abc" * 20


def test_a_refused_item_that_does_not_end_holds_no_room(gateways: Gateways) -> None:
    gateway = gateways(patience_s=0.5)
    with connection(gateway) as opened:
        opened.sendall(
            f"POST /v1/decodes/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: {MULTIPART['Content-Type']}\r\n"
            "Content-Length: 1000000\r\n\r\n".encode()
        )
        opened.sendall(begun(RAW_UNKNOWN))
        wait_until(lambda: gateway.parts.uploads.count == 1, what="the batch to begin")
        status, told = answer_of(opened)
    assert (status, told["code"]) == (408, "upload_too_slow")
    assert gateway.parts.uploads.count == 0


@pytest.mark.parametrize("end", [b"", b"\r\n--x", b"a" * 1000])
def test_a_batch_that_breaks_off_in_a_refused_item(gateway: RunningGateway, end: bytes) -> None:
    answer = gateway.post("/v1/decodes/batch", data=begun(RAW_UNKNOWN) + end, headers=MULTIPART)
    assert problem(answer) == (400, "bad_request")


@pytest.mark.parametrize("parts", [1, 3], ids=["too few", "too many"])
def test_parts_that_do_not_fit_the_jobs_are_refused_with_what_was_accepted(gateway: RunningGateway, parts: int) -> None:
    jobs = [{"vae": "sd", "job_id": "a"}, {"vae": "sd", "job_id": "b"}]
    files = [("jobs", (None, json.dumps(jobs))), *(("latents", (str(n), safetensors())) for n in range(parts))]
    answer = gateway.post("/v1/decodes/batch", files=files)
    assert problem(answer) == (400, "bad_request")
    accepted = [item["job"]["id"] for item in answer.json()["items"]]
    assert accepted == ["a", "b"][:parts]
    assert sorted(job["id"] for job in gateway.get("/v1/decodes").json()["jobs"]) == accepted


def two_begun() -> bytes:
    """A body with all of the first job, `first`, and the second, `second`, up to the midst of its latents."""
    jobs = json.dumps([{"vae": "sd", "job_id": name} for name in ("first", "second")]).encode()
    parts = ((b"jobs", jobs), (b"l", safetensors()), (b"l", safetensors()[:20]))
    return b"".join(b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part for part in parts)


def test_a_batch_that_breaks_off_tells_what_was_accepted_before(gateway: RunningGateway) -> None:
    answer = gateway.post("/v1/decodes/batch", data=two_begun(), headers=MULTIPART)
    assert problem(answer) == (400, "bad_request")
    (item,) = answer.json()["items"]
    assert (item["job"]["id"], answer.json()["job_id"]) == ("first", "second")
    assert gateway.get("/v1/decodes/first").json()["status"] == "queued"


def test_a_batch_that_stops_tells_what_was_accepted_before(gateways: Gateways) -> None:
    gateway = gateways(patience_s=2)
    with connection(gateway) as opened:
        opened.sendall(
            f"POST /v1/decodes/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: {MULTIPART['Content-Type']}\r\n"
            "Content-Length: 1000000\r\n\r\n".encode()
        )
        opened.sendall(two_begun())

        def is_accepted() -> bool:
            opened.sendall(b"more of the second")  # what has come is looked at when more comes
            return gateway.get("/v1/decodes/first").ok

        wait_until(is_accepted, what="the first job")
        status, told = answer_of(opened)
    assert (status, told["code"]) == (408, "upload_too_slow")
    assert told["items"][0]["job"]["id"] == "first"


def test_a_job_that_meets_an_error_of_ours_does_not_hide_the_others(
    guarded: RunningGateway,
    new_key: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    accept = SubmitAttempt.once

    def once(attempt: SubmitAttempt) -> bool:
        if attempt.job_id.endswith("_odd"):
            raise ZeroDivisionError
        return accept(attempt)

    monkeypatch.setattr(SubmitAttempt, "once", once)
    jobs = [{"vae": "sd", "job_id": name} for name in ("a", "odd", "b")]
    answer = batch(guarded, *jobs, key=new_key("submit", "read"))
    assert answer.status_code == 200, answer.text
    first, odd, last = answer.json()["items"]
    assert (first["job"]["id"], last["job"]["id"]) == ("a", "b")
    assert (odd["error"]["code"], odd["error"]["job_id"]) == ("internal_error", "odd")
    (record,) = [record for record in caplog.records if getattr(record, "action", "") == "request_broke"]
    assert record.exc_info is not None


def test_an_impossible_shape_is_refused_by_itself(gateway: RunningGateway) -> None:
    first, second, third = batch(gateway, {"vae": "sd"}, {"vae": "sd", "shape": "1,4"}, {"vae": "sd"}).json()["items"]
    assert second["error"]["code"] == "invalid_option"
    assert first["job"]["status"] == third["job"]["status"] == "queued"


@pytest.mark.parametrize(
    "item",
    [
        {"vae": "sd", "\ud800": 1},
        {"vae": "\udfff"},
        {"vae": "sd", "job_id": "\ud800"},
        {"vae": "sd", "layout": "\ud83d"},
        {"vae": "sd", "metadata": {"\ud800": "x"}},
        {"vae": "sd", "shape": [1, 4, 2, 2], "dtype": "\ud800"},
    ],
)
def test_half_a_character_in_the_options_is_refused_in_words(gateway: RunningGateway, item: dict[str, Any]) -> None:
    answer = batch(gateway, {"vae": "sd"}, item)
    assert answer.status_code == 200, answer.text
    accepted, refused = answer.json()["items"]
    assert accepted["job"]["status"] == "queued"
    assert refused["error"]["status"] == 422
    answer.content.decode()


def test_a_conflict_is_told_in_the_keys_own_names(guarded: RunningGateway, new_key: Callable[..., str]) -> None:
    token = new_key("submit", "read")
    assert batch(guarded, {"vae": "sd", "job_id": "cat"}, key=token).json()["items"][0]["job"]["id"] == "cat"
    answer = batch(guarded, {"vae": "sd", "job_id": "cat", "output": "jpg"}, key=token)
    (item,) = answer.json()["items"]
    assert (item["error"]["code"], item["error"]["job_id"]) == ("job_conflict", "cat")
    assert "k_" not in answer.text


def test_who_may_not_submit_is_told_before_the_body_is_read(
    guarded: RunningGateway, new_key: Callable[..., str]
) -> None:
    token = new_key("read")
    with connection(guarded) as opened:
        opened.sendall(
            f"POST /v1/decodes/batch HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
            f"Content-Type: {MULTIPART['Content-Type']}\r\nContent-Length: 1000000\r\n\r\n".encode()
        )
        status, told = answer_of(opened)
    assert (status, told["code"]) == (403, "not_allowed")


@pytest.mark.parametrize("path", ["/decode/sd?shape=1&shape=4&shape=2&shape=2&dtype=float32", "/encode/sd"])
def test_who_could_not_follow_the_redirect_is_told_before_a_job_is_made(
    guarded: RunningGateway, new_key: Callable[..., str], path: str
) -> None:
    answer = guarded.post(path, key=new_key("submit"), data=latents().tobytes(), allow_redirects=False)
    assert problem(answer) == (403, "not_allowed")
    assert guarded.get("/v1/decodes", key=new_key("read_all")).json()["jobs"] == []
