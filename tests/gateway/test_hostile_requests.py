"""Requests that no honest client sends: what a proxy could read in another way, paths out of where they belong, forms
that a job does not have."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

import pytest
import requests

from broker_config.decode_result import Artifact, DecodeResult
from tests.gateway.conftest import SAFETENSORS, latents, problem, safetensors
from tests.gateway.test_job_api import submit
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker

CANCEL = b"POST /v1/decodes/cat/cancel HTTP/1.1\r\nHost: localhost\r\n"
#: What a smuggled request would be: it must never be answered.
SECOND = b"DELETE /v1/decodes/cat HTTP/1.1\r\nHost: localhost\r\n\r\n"


def sent(gateway: RunningGateway, data: bytes) -> bytes:
    """Everything that comes back until the gateway closes the connection."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as opened:
        opened.sendall(data)
        got = b""
        while piece := opened.recv(65536):
            got += piece
    return got


# Two readings of one request --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        CANCEL + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        CANCEL + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        CANCEL + b"Content-Length: 0\r\nContent-Length: 61\r\n\r\n",
        CANCEL + b"Content-Length: +0\r\n\r\n",
        CANCEL + b"Content-Length: -1\r\n\r\n",
        CANCEL + b"Content-Length: 0x0\r\n\r\n",
        CANCEL + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        CANCEL + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        CANCEL + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        CANCEL + b"X: a\r\n folded\r\n\r\n",
        CANCEL + b"X: a\0b\r\n\r\n",
        CANCEL + b"Host: evil.example\r\n\r\n",
        CANCEL.replace(b"\r\n", b"\n") + b"\n",
        CANCEL.replace(b"Host: localhost\r\n", b"") + b"\r\n",
        CANCEL.replace(b"HTTP/1.1", b"HTTP/1.1 x") + b"\r\n",
        CANCEL.replace(b"POST ", b"POST\x0b") + b"\r\n",
    ],
    ids=range(16),
)
def test_what_can_be_read_in_two_ways_is_refused_and_nothing_after_it_is_read(
    gateway: RunningGateway, request_: bytes
) -> None:
    submit(gateway, name="cat")
    got = sent(gateway, request_ + SECOND)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.split()[1] == b"400", got
    assert b"application/problem+json" in head
    assert json.loads(body)["code"] == "bad_request", "that, and no second answer behind it"
    assert gateway.get("/v1/decodes/cat").json()["status"] == "queued"


@pytest.mark.parametrize(
    "target", ["http://evil.example/v1/decodes", "http://localhost:1/v1/decodes", "//x/v1/decodes"]
)
def test_a_target_with_another_host_is_refused(gateway: RunningGateway, target: str) -> None:
    got = sent(gateway, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert got.split()[1] in (b"400", b"404"), got
    own = "GET http://localhost/livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert sent(gateway, own.encode()).split()[1] == b"200"


@pytest.mark.parametrize(
    "header", ["Via", "X-Forwarded-Proto", "X-Forwarded-Server", "x-forwarded-port", "CF-Connecting-IP", "X-Client-IP"]
)
def test_whatever_a_proxy_adds_means_a_stranger(gateway: RunningGateway, header: str) -> None:
    assert problem(gateway.get("/v1/decodes", headers={header: "1.1 proxy"})) == (401, "not_authenticated")


# Names out of where they belong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "..%2f..%2fetc%2fpasswd", "%2e%2e%2fcat", "cat%00", "cat%2foutput%2f0", "cat%0d%0aX:y", "%ff", "%F0%9F%98%BC",
        "latentq:job:cat", "cat*", "c%3Ft", "a" * 65,
    ],
)  # fmt: skip
def test_an_id_is_a_name_and_no_path(gateway: RunningGateway, name: str) -> None:
    submit(gateway, name="cat")
    for method, path in (
        ("GET", f"/v1/decodes/{name}"),
        ("GET", f"/v1/decodes/{name}/events"),
        ("GET", f"/v1/decodes/{name}/output/0"),
        ("POST", f"/v1/decodes/{name}/cancel"),
        ("DELETE", f"/v1/decodes/{name}"),
        ("GET", f"/decode/sd/jobs/{name}"),
    ):
        assert problem(gateway.ask(method, path))[0] == 404, path
    put = gateway.ask("PUT", f"/v1/decodes/{name}?vae=sd", data=safetensors(), headers=SAFETENSORS)
    assert problem(put)[0] in (404, 422)
    assert [job["id"] for job in gateway.get("/v1/decodes").json()["jobs"]] == ["cat"]


# Forms that a job does not have -----------------------------------------------------------------------------------


def test_a_job_is_answered_in_a_form_it_has_or_refused(gateway: RunningGateway, worker: StoreWorker) -> None:
    made = {"tensor": safetensors(latents(3, 8, 8)), "png": b"picture"}
    for output, data in made.items():
        submit(gateway, name=output, output=output)
        claim = worker.claim_one()
        ref = worker.blobs.put(f"{claim.job_id}.{claim.execution}.0", data)
        extension = "safetensors" if output == "tensor" else output
        artifact = Artifact(blob=ref, content_type="application/octet-stream", extension=extension)
        worker.store.complete(claim, DecodeResult(artifacts=(artifact,), timings_s={}, decoded_by={}))
    fitting = {("tensor", "tensor"), ("png", "image")}
    for output in made:
        for form in ("image", "mp4", "tensor", "pixels", "unit"):
            answer = gateway.get(f"/decode/sd/jobs/{output}?form={form}")
            if (output, form) in fitting:
                assert answer.status_code == 200, (output, form)
            else:
                assert problem(answer) == (422, "invalid_option"), (output, form)


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor", "sigma_data", "decode_timestep", "timeout_s"])
def test_a_number_that_no_float_holds_is_refused_by_its_name(gateway: RunningGateway, name: str) -> None:
    submit(gateway, name="cat")
    gateway.post("/v1/decodes/cat/cancel")
    form = {
        "options": (None, json.dumps({"vae": "sd", name: 10**400}), "application/json"),
        "latents": ("l", safetensors(), "application/vnd.safetensors"),
    }
    for answer in (
        gateway.post("/v1/decodes", files=form),
        gateway.post("/v1/decodes/cat/redecode", json={name: -(10**400)}),
    ):
        assert problem(answer) == (422, "invalid_option")
        assert answer.json()["field"] == name


def test_a_preview_is_of_the_job_as_its_key_calls_it(
    guarded: RunningGateway, new_key: Callable[..., str], worker: StoreWorker
) -> None:
    token = new_key("submit", "read")
    submit(guarded, key=token, name="cat", preview="true")
    worker.store.show_preview(f"k_{token.split('_')[1]}_cat", b"a JPEG")
    worker.succeed(worker.claim_one())
    answer = requests.get(
        f"{guarded.url}/v1/decodes/cat/events", headers={"Authorization": f"Bearer {token}"}, timeout=30
    )
    assert "event: preview" in answer.text
    assert '"id": "cat"' in answer.text
    assert "k_" not in answer.text
