"""Each limit, and what happens at it: refused early, with a status that says so, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from broker_config.settings import Settings
from tests.gateway.conftest import RAW, SAFETENSORS, latents, problem, safetensors
from tests.gateway.test_job_api import stream, submit
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

Gateways = Callable[..., RunningGateway]
QUERY = "vae=sd&dtype=float32&shape="


@contextlib.contextmanager
def connection(gateway: RunningGateway) -> Iterator[socket.socket]:
    """A bare connection."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as opened:
        yield opened


def head(gateway: RunningGateway, path: str, *, length: int | None, more: str = "", method: str = "POST") -> bytes:
    """A request up to its body."""
    size = "" if length is None else f"Content-Length: {length}\r\n"
    return (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{gateway.port}\r\n"
        f"Content-Type: application/octet-stream\r\n{size}{more}\r\n"
    ).encode()


def answer_of(opened: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer that comes although the body does not."""
    data = b""
    while b"\r\n\r\n" not in data or len(data.partition(b"\r\n\r\n")[2]) < int(
        data.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0
    ):
        piece = opened.recv(65536)
        if not piece:
            break
        data += piece
    status = int(data.split()[1])
    return status, json.loads(data.partition(b"\r\n\r\n")[2])


# Before the body is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "length", "expected"),
    [
        ("/v1/decodes?vae=sd", 10**12, (413, "body_too_large")),
        (f"/v1/decodes?{QUERY}1,4,9000,9000", 4 * 4 * 9000 * 9000, (413, "body_too_large")),
        (f"/v1/decodes?{QUERY}1,4,4000,4000", 4 * 4 * 4000 * 4000, (422, "pixel_limit_exceeded")),
        (f"/v1/decodes?{QUERY}1,4,64,64", 4 * 4 * 64 * 64 + 1, (422, "tensor_file_oversized")),
        (f"/v1/decodes?{QUERY}1,4,64,64", 4 * 4 * 64 * 64 - 1, (422, "tensor_file_truncated")),
        (f"/v1/decodes?{QUERY}1,5,64,64", 4 * 5 * 64 * 64, (422, "latents_channels")),
        (f"/v1/decodes?{QUERY}1,4,64,64&height=100", 4 * 4 * 64 * 64, (422, "latents_size")),
        (f"/v1/decodes?{QUERY}1,4,64,64&output=gif", 4 * 4 * 64 * 64, (422, "invalid_option")),
        (f"/v1/decodes?{QUERY}1,4,64,64", None, (422, "tensor_file_truncated")),
        (
            "/decode/sd?dtype=float32&shape=1&shape=4&shape=4000&shape=4000",
            4**2 * 4000**2,
            (422, "pixel_limit_exceeded"),
        ),
        ("/decode/sd?dtype=float64&shape=1&shape=4&shape=8&shape=8", 2048, (422, "latents_dtype")),
    ],
)
def test_what_the_head_says_is_refused_although_no_body_comes(
    gateway: RunningGateway, path: str, length: int | None, expected: tuple[int, str]
) -> None:
    with connection(gateway) as opened:
        opened.sendall(head(gateway, path, length=length))
        status, told = answer_of(opened)
    assert (status, told["code"]) == expected


def test_a_header_of_safetensors_is_enough_to_refuse(gateway: RunningGateway) -> None:
    from broker_config.tensor_header import write_header

    start = write_header("float32", (1, 4, 4000, 4000))
    with connection(gateway) as opened:
        length = len(start) + 4 * 4 * 4000 * 4000
        opened.sendall(head(gateway, "/v1/decodes?vae=sd", length=length).replace(b"octet-stream", b"vnd.safetensors"))
        opened.sendall(start)
        status, told = answer_of(opened)
    assert (status, told["code"]) == (422, "pixel_limit_exceeded")


def test_a_body_of_unknown_length_is_not_read(gateway: RunningGateway) -> None:
    answer = gateway.post("/v1/decodes?vae=sd", data=iter([safetensors()]), headers=SAFETENSORS)
    assert problem(answer) == (411, "length_required")


def test_a_compressed_body_is_not_unpacked(gateway: RunningGateway) -> None:
    answer = gateway.post("/v1/decodes?vae=sd", data=b"\x1f\x8b", headers=SAFETENSORS | {"Content-Encoding": "gzip"})
    assert problem(answer) == (400, "bad_request")


def test_latents_larger_than_one_job_may_have(gateways: Gateways, settings: Settings) -> None:
    narrow = gateways(settings.model_copy(update={"max_latents_bytes": 1000}))
    answer = narrow.post(f"/v1/decodes?{QUERY}1,4,8,8", data=latents(1, 4, 8, 8).tobytes(), headers=RAW)
    assert problem(answer) == (413, "latents_too_large")


def test_a_query_a_header_and_json_that_are_too_long(gateways: Gateways) -> None:
    gateway = gateways(max_query_bytes=300, max_header_bytes=1000, max_form_bytes=100)
    assert problem(gateway.get("/v1/decodes?vae=" + "x" * 300)) == (414, "query_too_long")
    assert problem(gateway.get("/v1/decodes?vae=" + "x" * 20_000)) == (414, "query_too_long")
    assert problem(gateway.get("/v1/decodes/" + "x" * 3000)) == (414, "query_too_long")
    assert gateway.get("/v1/decodes", headers={"X-Long": "x" * 2000}).status_code == 400
    assert problem(gateway.post("/session", data=b"x" * 101)) == (413, "body_too_large")
    options = json.dumps({"vae": "sd", "metadata": {"prompt": "x" * 200}})
    answer = gateway.post("/v1/decodes", files=[("options", (None, options)), ("latents", ("l", safetensors()))])
    assert problem(answer) == (413, "body_too_large")


def test_a_batch_of_too_many(gateways: Gateways) -> None:
    gateway = gateways(max_batch_jobs=2)
    files = [("jobs", (None, json.dumps([{"vae": "sd"}] * 3)))] + [("latents", ("l", safetensors()))] * 3
    assert problem(gateway.post("/v1/decodes/batch", files=files)) == (413, "body_too_large")


# At a time ------------------------------------------------------------------------------------------------------


def test_too_many_uploads_at_a_time(gateways: Gateways) -> None:
    gateway = gateways(max_uploads=1)
    with connection(gateway) as opened:
        opened.sendall(head(gateway, f"/v1/decodes?{QUERY}1,4,8,8", length=1024))
        wait_until(lambda: gateway.parts.uploads.count == 1, what="the upload to begin")
        assert problem(submit(gateway)) == (503, "gateway_busy")
    wait_until(lambda: gateway.parts.uploads.count == 0, what="the upload to be given up")
    assert submit(gateway).status_code == 202


def test_too_many_bytes_at_a_time(gateways: Gateways) -> None:
    gateway = gateways(max_uploads_bytes=2000)
    with connection(gateway) as opened:
        opened.sendall(head(gateway, f"/v1/decodes?{QUERY}1,4,8,8", length=1024))
        wait_until(lambda: gateway.parts.uploads.count == 1, what="the upload to begin")
        answer = gateway.post(f"/v1/decodes?{QUERY}1,4,8,8", data=latents(1, 4, 8, 8).tobytes(), headers=RAW)
        assert problem(answer) == (503, "gateway_busy")


def test_too_many_streams(gateways: Gateways, new_key: Callable[..., str]) -> None:
    gateway = gateways(max_streams=2, max_streams_per_key=1, auth="required")
    token, other = new_key("read"), new_key("read")
    with requests.get(
        f"{gateway.url}/v1/overview/events", headers={"Authorization": f"Bearer {token}"}, stream=True, timeout=20
    ):
        assert problem(gateway.get("/v1/overview/events", key=token)) == (429, "rate_limited")
        with requests.get(
            f"{gateway.url}/v1/overview/events", headers={"Authorization": f"Bearer {other}"}, stream=True, timeout=20
        ):
            assert problem(gateway.get("/v1/overview/events", key=new_key("read"))) == (503, "gateway_busy")
    submit_key = new_key("submit", "read")
    submit(gateway, key=submit_key, name="x")
    wait_until(lambda: not gateway.parts.streams.open, timeout_s=30, what="the streams to be given up")


def test_a_full_queue(gateways: Gateways, settings: Settings) -> None:
    gateway = gateways(settings.model_copy(update={"max_pending_jobs": 1}))
    assert submit(gateway).status_code == 202
    assert problem(submit(gateway)) == (503, "queue_full")
    ready = gateway.get("/readyz")
    assert (ready.status_code, ready.json()["admission"]) == (503, "queue_full")


# Slow clients ---------------------------------------------------------------------------------------------------


def test_an_upload_that_stops_is_given_up(gateways: Gateways) -> None:
    gateway = gateways(patience_s=0.3, min_upload_bytes_per_s=1e6)
    with connection(gateway) as opened:
        opened.sendall(head(gateway, f"/v1/decodes?{QUERY}1,4,8,8", length=1024) + b"\0" * 100)
        status, told = answer_of(opened)
    assert (status, told["code"]) == (408, "upload_too_slow")
    assert gateway.parts.uploads.count == 0


@pytest.mark.parametrize(
    "start", [b"", b"GET /livez HTT", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: "], ids=["nothing", "line", "headers"]
)
def test_a_connection_without_a_request_is_closed(gateways: Gateways, start: bytes) -> None:
    gateway = gateways(patience_s=0.2)
    with connection(gateway) as opened:
        opened.sendall(start)
        assert opened.recv(1024) == b""


def test_too_many_connections(gateways: Gateways) -> None:
    gateway = gateways(max_connections=3)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connection(gateway)) for _ in range(8)]
        for one in opened:
            one.settimeout(0.01)

        def closed() -> int:
            return sum(1 for one in opened if ended(one))

        wait_until(lambda: closed() >= 5, what="the excess to be closed")
        assert closed() == 5


def ended(opened: socket.socket) -> bool:
    try:
        return opened.recv(1) == b""
    except TimeoutError:
        return False


def test_a_client_that_stops_reading_is_cut_off(gateways: Gateways, worker: StoreWorker) -> None:
    gateway = gateways(patience_s=0.5)
    submit(gateway, name="large")
    claim = worker.claim_one()
    worker.store.complete(claim, worker.result(claim, data=bytes(24 << 20)))
    with connection(gateway) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.sendall(head(gateway, "/v1/decodes/large/output/0", length=None, method="GET"))
        assert opened.recv(12) == b"HTTP/1.1 200"
        given_up = 'latentq_http_requests_total{method="GET",route="/v1/decodes/{id}/output/{number}",status="499"} 1.0'
        wait_until(lambda: given_up in gateway.get("/metrics").text, what="the gateway to give up")


# What is no HTTP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/decodes HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\r\n" * 1000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: \0\r\n\r\n",
    ],
)
def test_what_is_no_request_gets_no_stack_trace(gateway: RunningGateway, data: bytes) -> None:
    with connection(gateway) as opened:
        opened.sendall(data)
        opened.shutdown(socket.SHUT_WR)
        got = b""
        while piece := opened.recv(65536):
            got += piece
    assert b"Traceback" not in got
    assert b" 500 " not in got.partition(b"\r\n")[0]
    assert gateway.get("/livez").status_code == 200


def test_one_job_is_watched_and_the_gateway_stops(gateways: Gateways) -> None:
    gateway = gateways()
    submit(gateway, name="cat")
    events = stream(gateway, "/v1/decodes/cat/events")
    assert next(events)[0] == "queued"  # the fixture stops the gateway while this stream is open
