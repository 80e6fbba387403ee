"""Outputs on their way out: what they hold in memory, for whom, and what a browser may keep of them."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from broker_config.decode_result import Artifact, DecodeResult
from broker_config.messages import BlobRef
from broker_config.tensor_header import write_header
from producer.gateway.remote_replies import Reply, make_reply
from tests.gateway.conftest import problem
from tests.gateway.test_job_api import submit
from tests.gateway.test_limits import connection
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

Gateways = Callable[..., RunningGateway]
MIB = 1 << 20


def finish(worker: StoreWorker, data: bytes) -> None:
    claim = worker.claim_one()
    worker.store.complete(claim, worker.result(claim, data=data))


@contextlib.contextmanager
def reader(gateway: RunningGateway, path: str, more: str = "") -> Iterator[socket.socket]:
    """Asks for an output and reads none of it."""
    with connection(gateway) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode())
        yield opened


def test_outputs_that_are_held_are_bounded_in_bytes(gateways: Gateways, worker: StoreWorker) -> None:
    gateway = gateways(max_downloads_bytes=20 * MIB)
    submit(gateway, name="large")
    finish(worker, bytes(12 * MIB))
    path = "/v1/decodes/large/output"
    with reader(gateway, path):
        wait_until(lambda: gateway.parts.downloads.size_bytes == 12 * MIB, what="the first to be read")
        assert problem(gateway.get(path)) == (503, "gateway_busy")
        assert problem(gateway.get("/decode/sd/jobs/large?form=image")) == (503, "gateway_busy")
        assert gateway.get(path, headers={"Range": "bytes=0-99"}).content == bytes(100)
        assert gateway.ask("HEAD", path).headers["Content-Length"] == str(12 * MIB)
    wait_until(lambda: gateway.parts.downloads.count == 0, what="the first to be given up")
    assert len(gateway.get(path).content) == 12 * MIB
    assert gateway.parts.downloads.size_bytes == 0


def test_one_key_cannot_have_all_of_it(gateways: Gateways, worker: StoreWorker, new_key: Callable[..., str]) -> None:
    gateway = gateways(max_downloads_bytes=40 * MIB, auth="required")
    greedy, other = new_key("submit", "read"), new_key("submit", "read")
    for key in (greedy, other):
        submit(gateway, key=key, name="large")
        finish(worker, bytes(12 * MIB))
    path = "/v1/decodes/large/output"
    with reader(gateway, path, f"Authorization: Bearer {greedy}\r\n"):
        wait_until(lambda: gateway.parts.downloads.count == 1, what="the first to be read")
        assert problem(gateway.get(path, key=greedy)) == (429, "rate_limited")
        assert len(gateway.get(path, key=other).content) == 12 * MIB


def test_a_range_is_all_that_is_read(
    gateway: RunningGateway, worker: StoreWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 100
    submit(gateway, name="cat")
    finish(worker, data)

    def whole(ref: BlobRef) -> bytes:
        raise AssertionError("the whole output was read")

    monkeypatch.setattr(gateway.parts.client.blobs, "get", whole)
    for asked, found in (("0-0", data[:1]), ("255-300", data[255:301]), ("-7", data[-7:]), ("25000-", data[25000:])):
        answer = gateway.get("/v1/decodes/cat/output", headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, found)
        assert answer.headers["Content-Range"].endswith(f"/{len(data)}")


def test_a_browser_asks_again_whose_picture_it_is(
    guarded: RunningGateway, worker: StoreWorker, new_key: Callable[..., str]
) -> None:
    one, other = new_key("submit", "read"), new_key("submit", "read")
    for key, data in ((one, b"AAAA"), (other, b"BBBB")):
        submit(guarded, key=key, name="cat")
        finish(worker, data)
    first = guarded.get("/v1/decodes/cat/output", key=one)
    known = {"If-None-Match": first.headers["ETag"]}
    again, theirs = (guarded.get("/v1/decodes/cat/output", key=key, headers=known) for key in (one, other))
    assert (again.status_code, theirs.status_code, theirs.content) == (304, 200, b"BBBB")
    for answer in (first, again, theirs):
        assert set(answer.headers["Cache-Control"].split(", ")) == {"private", "no-cache"}
        assert set(answer.headers["Vary"].split(", ")) == {"Authorization", "Cookie"}


class Shelf:
    """Blobs by name."""

    def __init__(self, **blobs: bytes) -> None:
        self.blobs = blobs

    def get(self, ref: BlobRef) -> bytes:
        return self.blobs[ref.name]

    def result(self) -> DecodeResult:
        refs = [BlobRef(store="redis", name=name, sha256="", size_bytes=len(data)) for name, data in self.blobs.items()]
        return DecodeResult(
            artifacts=tuple(Artifact(blob=ref, content_type="x/y", extension="safetensors") for ref in refs),
            timings_s={},
            decoded_by={},
        )


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 512, 700)], ids=["small", "several pieces"])
def test_base64_of_several_tensors_is_that_of_all_their_bytes(shape: tuple[int, ...]) -> None:
    arrays = [np.random.default_rng(seed).standard_normal(shape).astype(np.float32) for seed in (0, 1)]
    head = write_header("float32", shape)
    shelf = Shelf(a=head + arrays[0].tobytes(), b=head + arrays[1].tobytes())
    made = make_reply(Reply(form="tensor", base64=True), shelf.result(), shelf, is_clip=False)  # type: ignore[arg-type]
    told = json.loads(bytes(made.body))
    assert told["parameters"] == {"shape": [2, *shape], "dtype": "float32"}
    assert told["inputs"] == base64.b64encode(np.stack(arrays).tobytes()).decode()
    assert struct.unpack("<f", base64.b64decode(told["inputs"])[:4])[0] == arrays[0].reshape(-1)[0]
