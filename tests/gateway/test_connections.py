"""Connections: one in use is kept, one that takes nothing is cut, and no answer spills into the next."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from broker_config.settings import Settings
from producer.gateway.routes import ROUTES
from tests.gateway.conftest import problem, safetensors
from tests.gateway.test_job_api import submit
from tests.gateway.test_limits import connection
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

Gateways = Callable[..., RunningGateway]


def test_a_connection_in_use_is_kept_however_long(gateways: Gateways) -> None:
    gateway = gateways(patience_s=0.5)
    kept = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
    kept.connect()
    kept.auto_open = 0  # raises instead of connecting anew
    until = time.monotonic() + 6 * gateway.settings.patience_s
    with contextlib.closing(kept):
        while time.monotonic() < until:
            kept.request("GET", "/livez")
            assert kept.getresponse().read() == b"alive\n"


def test_a_long_poll_may_outlast_the_patience(gateways: Gateways) -> None:
    gateway = gateways(patience_s=0.2, wait_s=1.5)
    submit(gateway, name="cat")
    assert gateway.get("/v1/decodes/cat?wait=1.5").json()["status"] == "queued"


def waits(gateway: RunningGateway) -> int:
    """Long-polls that go on."""
    return sum(task.get_name() == "wait-for-job" for task in asyncio.all_tasks(gateway.loop))


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /v1/decodes/cat?wait=300 HTTP/1.1\r\n",
        b"GET /decode/sd/jobs/cat?form=image HTTP/1.1\r\n",
        b"PUT /v1/decodes/cat?vae=sd HTTP/1.1\r\nPrefer: wait=300\r\nContent-Type: application/vnd.safetensors\r\n",
    ],
    ids=["job", "remote", "submit"],
)
def test_a_long_poll_ends_with_its_client(gateways: Gateways, request_: bytes) -> None:
    gateway = gateways(wait_s=300)
    submit(gateway, name="cat")
    body = safetensors() if request_.startswith(b"PUT") else b""
    with connection(gateway) as opened:
        opened.sendall(request_ + b"Host: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: waits(gateway) == 1, what="the wait to begin")
    wait_until(lambda: waits(gateway) == 0, what="the wait to end")


def held(gateway: RunningGateway) -> int:
    """Connections that the gateway has, this one included."""
    text = requests.get(f"{gateway.url}/metrics", timeout=20).text
    return int(float(text.partition("\nlatentq_http_connections ")[2].partition("\n")[0]))


@pytest.mark.parametrize("count", [1, 400], ids=["one answer", "pipelined"])
def test_who_does_not_take_the_answer_is_cut_off(gateways: Gateways, count: int) -> None:
    gateway = gateways(patience_s=0.5)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", gateway.port))
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
        wait_until(lambda: held(gateway) == 1, what="the connections to be given up")


def test_closed_connections_make_room(gateways: Gateways) -> None:
    gateway = gateways(max_connections=2)
    for _ in range(5):
        with connection(gateway) as first, connection(gateway) as second:
            for opened in (first, second):
                opened.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert opened.recv(15) == b"HTTP/1.1 200 OK"


# HEAD -----------------------------------------------------------------------------------------------------------


def test_no_answer_to_head_has_a_body(gateway: RunningGateway, worker: StoreWorker) -> None:
    submit(gateway, name="cat")
    claim = worker.claim_one()
    trap = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"
    worker.store.complete(claim, worker.result(claim, data=trap))
    filled = {"{id}": "cat", "{number}": "0", "{vae}": "sd", "{name}": "status.js"}
    paths = {route.path for route in ROUTES if route.method == "GET"} | {"/nothing"}
    for path in sorted(paths):
        for name, value in filled.items():
            path = path.replace(name, value)
        with connection(gateway) as opened:
            head = f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            opened.sendall(f"{head}GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            got = b""
            while piece := opened.recv(65536):
                got += piece
        assert b"EVIL" not in got, path
        first, _, second = got.partition(b"\r\n\r\n")
        assert first.startswith(b"HTTP/1.1 "), path
        assert second.startswith(b"HTTP/1.1 200 OK\r\n"), (path, second)
        assert second.endswith(b"\r\n\r\nalive\n"), (path, second)


# When the gateway stops -----------------------------------------------------------------------------------------


def test_who_waits_or_watches_is_answered_at_once_when_the_gateway_stops(settings: Settings) -> None:
    with ThreadPoolExecutor(3) as pool:
        with RunningGateway(settings) as gateway:
            submit(gateway, name="cat")
            asked = [
                f"{gateway.url}/v1/{path}" for path in ("decodes/cat?wait=25", "decodes/cat/events", "overview/events")
            ]
            answers = [pool.submit(requests.get, url, timeout=30) for url in asked]
            wait_until(lambda: gateway.parts.streams.open.total() == 2, what="both streams")
            wait_until(lambda: held(gateway) >= 5, what="the long-poll besides, the submit and this look")
            began = time.monotonic()
        assert time.monotonic() - began < 8, "it does not wait for them"
        poll, *streams = (answer.result() for answer in answers)
    assert poll.json()["status"] == "queued"
    for answer in streams:
        assert answer.text.startswith("retry: "), "it ended as a stream ends, and was not cut off"


# What is refused before there is a request ----------------------------------------------------------------------


def test_what_is_no_request_gets_a_problem_and_no_traceback_in_the_log(
    gateways: Gateways, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = gateways(max_header_bytes=1000)
    with caplog.at_level(logging.INFO):
        long = gateway.get("/livez", headers={"X-Long": "secret" * 400})
        odd = gateway.post("/v1/decodes?vae=sd", data=b"x", headers={"Expect": "the-impossible"})
    for answer in (long, odd):
        assert problem(answer) == (400, "bad_request")
        assert answer.headers["Server"] == "latentq"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "secret" not in answer.text
    assert any(getattr(record, "action", "") == "request_unreadable" for record in caplog.records)
    assert not any(record.exc_info for record in caplog.records)
    assert "secret" not in caplog.text
