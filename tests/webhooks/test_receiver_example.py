"""The example receiver as a process: what is signed is stored once and fetched, also if it is killed in between."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from standardwebhooks import Webhook

from broker_config.settings import Settings
from producer.client import DecodeClient
from tests.support.gateways import RunningGateway
from tests.support.processes import ROOT
from tests.support.receivers import SECRET, CourierThread
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until
from tests.webhooks.conftest import LATENTS

PICTURE = b"\x89PNG picture"


class Shop(BaseHTTPRequestHandler):
    """Where the pictures are fetched from; as the gateway, but it can be out of order."""

    closed = False
    gone: tuple[str, ...] = ()
    fetched: list[str]

    def do_GET(self) -> None:
        self.fetched.append(self.path)
        self.send_response(503 if type(self).closed else 410 if self.path in type(self).gone else 200)
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def shop() -> Iterator[tuple[str, type[Shop]]]:
    kind = type("OneShop", (Shop,), {"fetched": [], "closed": False})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, name="shop")
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", kind
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def receiving(folder: Path, *, end: signal.Signals = signal.SIGINT) -> Iterator[str]:
    """The example, once it listens; `folder` is its own."""
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    environment = os.environ | {"WEBHOOK_SECRET": f"{'whsec_' + 'REVG' * 11},{SECRET}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "examples/webhook_receiver.py", "--port", "0", "--folder", str(folder / "pictures")]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:

        def url() -> str:
            assert process.poll() is None, log.read_text()
            return log.read_text().partition("receiving at ")[2].partition("\n")[0]

        yield wait_until(url, what="the receiver")
        process.send_signal(end)
        assert process.wait(30) == (-end if end is signal.SIGKILL else 0), log.read_text()
    finally:
        process.kill()
        process.wait()


def send(url: str, body: str, *, name: str = "msg_cat_succeeded", secret: str = SECRET, age_s: float = 0) -> int:
    at = datetime.fromtimestamp(time.time() - age_s, UTC)
    headers = {
        "webhook-id": name,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign(name, at, body),
    }
    return requests.post(url, data=body.encode(), headers=headers, timeout=30).status_code


def message(shop_url: str, *, job: str = "cat", path: str = "/1") -> str:
    output = f'{{"url": "{shop_url}{path}", "extension": "png"}}'
    return f'{{"type": "job.succeeded", "data": {{"id": "{job}", "outputs": [{output}]}}}}'


def test_a_message_is_taken_once_and_its_picture_fetched(tmp_path: Path, shop: tuple[str, type[Shop]]) -> None:
    with receiving(tmp_path) as url:
        for _ in range(3):
            assert send(url, message(shop[0])) == 204
        picture = tmp_path / "pictures" / "cat-0.png"
        wait_until(picture.exists)
        assert send(url, message(shop[0], job="dog", path="/2"), name="msg_dog_succeeded") == 204
        wait_until((tmp_path / "pictures" / "dog-0.png").exists)
    assert picture.read_bytes() == PICTURE
    assert shop[1].fetched == ["/1", "/2"]


def test_what_is_not_ours_is_refused_and_nothing_of_it_is_done(tmp_path: Path, shop: tuple[str, type[Shop]]) -> None:
    with receiving(tmp_path) as url:
        assert send(url, message(shop[0]), secret="whsec_" + "R0hJ" * 11) == 401
        assert send(url, message(shop[0]), age_s=400) == 401
        assert requests.post(url, data=message(shop[0]), timeout=30).status_code == 401
        broken = {"webhook-id": "a", "webhook-timestamp": str(int(time.time())), "webhook-signature": "v1 nothing"}
        assert requests.post(url, data=message(shop[0]), headers=broken, timeout=30).status_code == 401
        assert requests.post(url, data=b"x" * 70_000, timeout=30).status_code == 413
        assert requests.post(url, data=b"\xff", headers=broken, timeout=30).status_code == 401
        assert send(url, message(shop[0], job="../../cat"), name="msg_path") == 204
        assert send(url, message(shop[0], path="/last"), name="msg_last") == 204
        wait_until((tmp_path / "pictures" / "cat-0.png").exists)
    assert shop[1].fetched == ["/last"]


def test_what_was_not_fetched_when_it_was_killed_is_fetched_by_the_next(
    tmp_path: Path, shop: tuple[str, type[Shop]]
) -> None:
    shop[1].closed = True
    with receiving(tmp_path, end=signal.SIGKILL) as url:
        assert send(url, message(shop[0])) == 204
        wait_until(lambda: shop[1].fetched)
    shop[1].closed = False
    picture = tmp_path / "pictures" / "cat-0.png"
    assert not picture.exists()
    with receiving(tmp_path) as url:
        wait_until(picture.exists)
        assert send(url, message(shop[0], path="/again")) == 204, "it came before"
    assert "/again" not in shop[1].fetched


def test_a_link_that_is_gone_is_asked_once_and_the_other_outputs_come(
    tmp_path: Path, shop: tuple[str, type[Shop]]
) -> None:
    shop[1].gone = ("/1",)
    body = message(shop[0]).replace("}]", f'}}, {{"url": "{shop[0]}/2", "extension": "png"}}]')
    with receiving(tmp_path) as url:
        assert send(url, body) == 204
        wait_until(lambda: is_done(tmp_path, "msg_cat_succeeded"), what="the message to be done with")
    assert shop[1].fetched == ["/1", "/2"]
    assert [path.name for path in (tmp_path / "pictures").glob("*.png")] == ["cat-1.png"]


def is_done(folder: Path, name: str) -> bool:
    with contextlib.closing(sqlite3.connect(folder / "pictures" / "inbox.sqlite")) as inbox:
        return inbox.execute("SELECT done FROM inbox WHERE id = ?", (name,)).fetchall() == [(1,)]


def test_a_message_that_goes_wrong_waits_longer_each_time_and_holds_up_no_other(
    tmp_path: Path, shop: tuple[str, type[Shop]]
) -> None:
    broken = '{"type": "job.succeeded", "data": {"id": "cat", "outputs": [{"extension": "png"%s}]}}'
    log = tmp_path / "log.txt"
    with receiving(tmp_path) as url:
        assert send(url, broken % "", name="msg_without_a_url") == 204
        assert send(url, broken % ', "inline": "abc"', name="msg_inline") == 204
        assert send(url, message(shop[0], job="dog"), name="msg_dog_succeeded") == 204
        wait_until((tmp_path / "pictures" / "dog-0.png").exists, what="the picture of the one after them")
        shop[1].closed = True
        assert send(url, message(shop[0], path="/2?signature=s3cret"), name="msg_closed") == 204
        again = [f"{name}: " for name in ("msg_without_a_url", "msg_inline", "msg_closed")]

        def longer() -> list[str]:
            return [line for line in log.read_text().splitlines() if line.endswith("trying again in 2 s")]

        wait_until(lambda: len(longer()) == len(again), what="a longer pause for each")
        assert all(any(line.startswith(name) for line in longer()) for name in again)
    assert "s3cret" not in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_job_ends_and_its_picture_is_in_the_folder(
    tmp_path: Path, settings: Settings, client: DecodeClient, worker: StoreWorker
) -> None:
    with RunningGateway(settings) as gateway, receiving(tmp_path) as url:
        linked = settings.model_copy(update={"public_url": gateway.url})
        with CourierThread(linked):
            client.submit(LATENTS, vae="sd", job_id="cat", webhook=url, webhook_secret=SECRET)
            claim = worker.claim_one()
            worker.store.complete(claim, worker.result(claim, data=PICTURE))
            picture = tmp_path / "pictures" / "cat-0.png"
            wait_until(picture.exists)
    assert picture.read_bytes() == PICTURE
