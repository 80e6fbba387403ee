"""Bodies on their way in: what they hold, for how long, and for whom."""

from __future__ import annotations

import base64
import binascii
import json
import select
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from broker_config.messages import DecodeRequest
from tests.gateway.conftest import RAW, latents, problem, safetensors
from tests.gateway.test_limits import QUERY, answer_of, connection, head
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

Gateways = Callable[..., RunningGateway]
#: 16 MB, for which the slowest rate allows 800 s.
LARGE = f"/v1/decodes?{QUERY}1,4,1000,1000", 4 * 4 * 1000 * 1000


# Time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 100_000])
def test_a_large_body_that_does_not_come_is_given_up_like_a_small_one(gateways: Gateways, sent: int) -> None:
    gateway = gateways(patience_s=0.5)
    with connection(gateway) as opened:
        path, length = LARGE
        opened.sendall(head(gateway, path, length=length) + bytes(sent))
        status, told = answer_of(opened)
    assert (status, told["code"]) == (408, "upload_too_slow")
    assert gateway.parts.uploads.count == 0


def test_a_body_that_drips_is_given_up(gateways: Gateways) -> None:
    gateway = gateways(patience_s=0.5)
    with connection(gateway) as opened:
        path, length = LARGE
        opened.sendall(head(gateway, path, length=length))
        while not select.select([opened], [], [], 0.05)[0]:  # 20 bytes a second are no 20 kB
            opened.sendall(b"\0")
        status, told = answer_of(opened)
    assert (status, told["code"]) == (408, "upload_too_slow")


# Memory ---------------------------------------------------------------------------------------------------------


def test_nothing_is_allocated_for_what_is_only_said(gateway: RunningGateway) -> None:
    tracemalloc.start()
    try:
        with connection(gateway) as opened:
            path, length = LARGE
            opened.sendall(head(gateway, path, length=length) + bytes(1000))
            wait_until(lambda: gateway.parts.uploads.count == 1, what="the upload to begin")
            assert gateway.get("/livez").status_code == 200  # the loop has come round since
            assert tracemalloc.get_traced_memory()[1] < length / 4
    finally:
        tracemalloc.stop()


def test_one_key_cannot_have_all_the_room(gateways: Gateways, new_key: Callable[..., str]) -> None:
    gateway = gateways(auth="required", max_uploads=4, max_uploads_bytes=6000)
    greedy, other = new_key("submit", "read"), new_key("submit", "read")
    path = f"/v1/decodes?{QUERY}1,4,8,8"

    def post(key: str, shape: tuple[int, ...] = (1, 4, 8, 8)) -> Any:
        query = QUERY + ",".join(map(str, shape))
        return gateway.post(f"/v1/decodes?{query}", key=key, data=latents(*shape).tobytes(), headers=RAW)

    begun = head(gateway, path, length=1024, more=f"Authorization: Bearer {greedy}\r\n")
    with connection(gateway) as first:
        first.sendall(begun)
        wait_until(lambda: gateway.parts.uploads.count == 1, what="the first to begin")
        assert problem(post(greedy, (1, 4, 12, 12))) == (429, "rate_limited")  # 1024 + 2304 bytes are over the half
        assert post(other, (1, 4, 12, 12)).status_code == 202
        with connection(gateway) as second:
            second.sendall(begun)
            wait_until(lambda: gateway.parts.uploads.count == 2, what="the second to begin")
            assert problem(post(greedy)) == (429, "rate_limited")  # a third of four
            assert post(other).status_code == 202
    wait_until(lambda: gateway.parts.uploads.count == 0, what="the uploads to be given up")
    assert gateway.parts.uploads.size_bytes == 0
    assert post(greedy).status_code == 202


# Multipart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "status"), [(b"", 202), (b"\r\n", 202), (b"\n" * 50, 400), (b"hello\r\n" * 9, 400)])
def test_a_multipart_body_begins_with_its_boundary(gateway: RunningGateway, before: bytes, status: int) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="latents"\r\n\r\n' + safetensors() + b"\r\n--x--\r\n"
    answer = gateway.post(
        "/v1/decodes?vae=sd", data=before + body, headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code == status, answer.text


# tensor/base64 --------------------------------------------------------------------------------------------------


def post_base64(gateway: RunningGateway, shape: tuple[int, ...], body: bytes) -> Any:
    query = "&".join(f"shape={size}" for size in shape)
    return gateway.post(
        f"/decode/sd?dtype=float32&{query}",
        data=body,
        headers={"Content-Type": "tensor/base64"},
        allow_redirects=False,
    )


@pytest.mark.parametrize("behind", [{}, {"parameters": {"shape": [1, 4, 300, 300]}}])
def test_base64_is_decoded_a_piece_at_a_time_and_not_on_the_loop(
    gateways: Gateways, worker: StoreWorker, monkeypatch: pytest.MonkeyPatch, behind: dict[str, Any]
) -> None:
    gateway = gateways(wait_s=0.1)
    shape = (1, 4, 300, 300)  # 1,920,000 characters
    array = latents(*shape)
    body = json.dumps({"inputs": base64.b64encode(array.tobytes()).decode()} | behind).encode()
    calls: list[tuple[str, int]] = []
    decode = binascii.a2b_base64

    def noted(data: Any, /, *, strict_mode: bool = False) -> bytes:
        calls.append((threading.current_thread().name, len(data)))
        return decode(data, strict_mode=strict_mode)

    monkeypatch.setattr(binascii, "a2b_base64", noted)
    assert post_base64(gateway, shape, body).status_code == 303
    assert len(calls) > 1
    assert all(name.startswith("transfers") and size <= 1 << 20 for name, size in calls), calls
    request = DecodeRequest.from_wire(worker.claim_one().message)
    assert gateway.parts.client.blobs.get(request.latents) == safetensors(array)


GOOD = base64.b64encode(latents(1, 4, 2, 2).tobytes()).decode()


@pytest.mark.parametrize(
    "text",
    [
        f'{{"inputs": "{GOOD}"',
        f'{{"input": "{GOOD}"}}',
        f'["inputs", "{GOOD}"]',
        f'{{"inputs": "{GOOD[:-4]}!!!="}}',
        f'{{"inputs": "AA=={GOOD[4:]}"}}',
        f'{{"inputs": "{GOOD[:-1]}\\n"}}',
        f'{{"inputs": "{GOOD}", "inputs": "{GOOD}"}}',
        f'{{"inputs": "", "b": "{GOOD}"}}',
        f'{{"b": {{"inputs": "{GOOD}"}}}}',
        "[" * 100,
    ],
)
def test_what_is_not_that_json_is_refused(gateway: RunningGateway, text: str) -> None:
    status, code = problem(post_base64(gateway, (1, 4, 2, 2), text.encode()))
    assert (status, code) in ((400, "bad_request"), (422, "tensor_file_truncated"))
