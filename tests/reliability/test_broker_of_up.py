"""The embedded broker of `latentq up`: a server that ends is started again, by the one process that may."""

from __future__ import annotations

import logging
import os
import signal
from importlib import resources
from pathlib import Path

import pytest

from broker_config.broker_folder import find_running
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.supported_servers import find_server_binary
from producer import DecodeClient, JobStatus
from producer import kept_broker as module
from producer.kept_broker import KeptBroker
from producer.supervisor import next_pause_s
from tests.support.embedded_brokers import get, is_locked, put, script
from tests.support.up import latentq_up
from tests.support.wait import wait_until


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "next_pause_s", lambda pause_s, *, lived_s: 0.01)


def actions(caplog: pytest.LogCaptureFixture) -> list[str | None]:
    return [getattr(record, "action", None) for record in caplog.records if record.levelno >= logging.WARNING]


def kill_server(broker: EmbeddedBroker) -> int:
    """SIGKILL, as the kernel sends it where memory is short. Returns its pid."""
    pid = broker.start().pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: broker.ended() is not None, what="the server's end")
    return pid


def test_a_server_that_was_killed_is_started_again_with_its_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with EmbeddedBroker(tmp_path / "broker") as broker:
        kept = KeptBroker(broker)
        put(broker.url, "a", "b")
        url, killed = broker.url, kill_server(broker)

        def back() -> bool:
            kept.check()
            return broker.ended() is None

        wait_until(back, what="the server")
        assert broker.start().pid != killed
        assert (broker.url, get(url, "a")) == (url, "b")
        kept.check()
    assert actions(caplog) == ["child_ended"]


def test_one_that_does_not_start_is_tried_again_and_nobody_else_gets_its_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    binary = script(tmp_path / "server", f'[ -e "{broken}" ] && exit 3\nexec "{find_server_binary(None)}" "$@"\n')
    with EmbeddedBroker(tmp_path / "broker", binary=binary) as broker:
        kept = KeptBroker(broker)
        put(broker.url, "a", "b")
        url = broker.url
        broken.touch()
        kill_server(broker)

        def failed() -> bool:
            kept.check()
            return actions(caplog).count("broker_start_failed") == 2

        wait_until(failed, what="two starts in vain")
        assert broker.url == url
        assert is_locked(tmp_path / "broker" / "owner.lock")
        broken.unlink()

        def back() -> bool:
            kept.check()
            return find_running(tmp_path / "broker") is not None

        wait_until(back, what="the server")
        assert get(url, "a") == "b"
    assert not is_locked(tmp_path / "broker" / "owner.lock")


def test_pauses_grow_with_each_quick_end_up_to_a_bound() -> None:
    pauses = [0.5]
    for _ in range(8):
        pauses.append(next_pause_s(pauses[-1], lived_s=1.0))
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert next_pause_s(30.0, lived_s=3600.0) == 0.5


@pytest.mark.slow
def test_jobs_go_on_after_the_server_of_a_running_latentq_up_was_killed(tmp_path: Path) -> None:
    latents = resources.files("worker") / "demo_vae" / "latents" / "astronaut.safetensors"
    with latentq_up(tmp_path, vaes=["demo"]) as running:
        first = find_running(tmp_path / "data" / "broker")
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)

        def again() -> bool:
            state = find_running(tmp_path / "data" / "broker")
            return state is not None and state.pid != first.pid

        wait_until(again, timeout_s=60, what="another server")
        with (
            DecodeClient.from_url(running.broker_url, _env_file=None) as client,
            resources.as_file(latents) as path,
        ):
            assert client.submit_file(path, vae="demo").wait(120).status is JobStatus.SUCCEEDED
