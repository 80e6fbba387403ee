"""What the embedded broker promises, on real servers: restarts, crashes, and reading its data."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from broker_config import embedded_broker as module
from broker_config.broker_folder import find_running
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import (
    BrokerUnreachable,
)
from tests.support.embedded_brokers import (
    client_of,
    get,
    has_ended,
    is_locked,
    processes_about,
    put,
    script,
)
from tests.support.wait import wait_until

# Restarts and crashes -----------------------------------------------------------------------------------


def test_a_restart_keeps_url_and_data(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        put(broker.url, "a", "b")
        first, second = broker.start(), broker.restart()
        assert second.url == first.url
        assert second.pid != first.pid
        assert has_ended(first.pid)
        assert get(broker.url, "a") == "b"
        assert find_running(data_dir) == second
        assert (data_dir / "broker.log.1").exists()


def test_what_was_answered_survives_sigkill_in_the_middle_of_an_fsync(data_dir: Path, binary: Path) -> None:
    """With `everysec` an fsync begins each second, and what is written meanwhile waits in memory, but is answered."""
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        broker.start()
        with client_of(broker.url) as client:
            end = time.monotonic() + 2.5
            for number in itertools.count():
                client.set("answered", number)
                if client.info("persistence")["aof_pending_bio_fsync"] or time.monotonic() > end:
                    break
            client.set("answered", number + 1)
        broker.kill()
        broker.start()
        assert get(broker.url, "answered") == str(number + 1)


def test_data_survive_sigkill_of_the_server(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        first = broker.start()
        for number in range(100):
            put(broker.url, f"key {number}", "x" * 1000)
        broker.kill()
        assert has_ended(first.pid)
        assert find_running(data_dir) is None
        assert broker.url == first.url  # clients go on trying there
        assert broker.start().pid != first.pid
        assert broker.url == first.url
        with client_of(broker.url) as client:
            assert client.dbsize() == 100


def test_a_start_brings_back_a_server_that_died(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        first = broker.start()
        put(broker.url, "a", "b")
        os.kill(first.pid, signal.SIGKILL)
        wait_until(lambda: has_ended(first.pid))
        assert broker.start().pid != first.pid
        assert get(broker.url, "a") == "b"


def test_a_command_cut_short_by_a_crash_is_dropped(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        put(broker.url, "a", "b")
        broker.kill()
        (log,) = (data_dir / "appendonlydir").glob("*.incr.aof")
        with log.open("ab") as file:
            file.write(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$100\r\ncut")
        broker.start()
        assert get(broker.url, "a") == "b"


def test_a_start_waits_for_the_rewrite_that_outlives_a_killed_server(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker, ThreadPoolExecutor(1) as pool:
        with client_of(broker.url) as client:
            for number in range(60):
                client.set(f"key {number}", "x")
            client.config_set("rdb-key-save-delay", "500000")  # given: a rewrite that takes half a minute
            client.bgrewriteaof()
            wait_until(lambda: client.info("persistence")["aof_rewrite_in_progress"])
        broker.kill()
        (rewrite,) = processes_about(data_dir)
        assert is_locked(data_dir / "server.lock")
        started = pool.submit(broker.start)
        assert processes_about(data_dir) == {rewrite}
        assert not started.done()
        os.kill(rewrite, signal.SIGKILL)
        with client_of(started.result(timeout=30).url) as client:
            assert client.dbsize() == 60


def test_a_server_that_does_not_stop_is_killed_and_that_is_logged(
    data_dir: Path, binary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_STOP_BOUND_S", 0.1)
    broker = EmbeddedBroker(data_dir, binary=binary)
    state = broker.start()
    os.kill(state.pid, signal.SIGSTOP)
    with caplog.at_level(logging.ERROR):
        broker.stop()
    assert has_ended(state.pid)
    assert [getattr(record, "action", None) for record in caplog.records] == ["broker_killed"]


def test_stop_leaves_a_state_file_that_is_not_ours(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary):
        (data_dir / "broker.json").write_text("another's")
    assert (data_dir / "broker.json").read_text() == "another's"


# While it reads its data --------------------------------------------------------------------------------


@pytest.fixture
def slow_loader(tmp_path: Path, data_dir: Path, binary: Path) -> Path:
    """A server that takes twelve seconds to read the data that `data_dir` holds by now."""
    with EmbeddedBroker(data_dir, binary=binary) as broker, client_of(broker.url) as client:
        for number in range(60):
            client.set(f"key {number}", os.urandom(4000))
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        wait_until(lambda: not client.info("persistence")["aof_rewrite_scheduled"])
    options = "--key-load-delay 200000 --loading-process-events-interval-bytes 1024"
    return script(tmp_path / "slow-server", f'exec "{binary}" "$@" {options}\n')


def is_loading(url: str) -> bool:
    with client_of(url) as client:
        try:
            client.ping()
        except redis.BusyLoadingError:
            return True
        except redis.RedisError:
            return False
    raise AssertionError("it was not to be ready")


def test_start_waits_while_the_data_are_read(data_dir: Path, binary: Path, slow_loader: Path) -> None:
    broker = EmbeddedBroker(data_dir, binary=slow_loader)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(broker.start)
        try:
            url = f"unix://{data_dir}/run/broker.sock"
            wait_until(lambda: is_loading(url))
            assert not started.done()
            assert find_running(data_dir) is None
            with client_of(url) as client:
                client.config_set("key-load-delay", "0")
            state = started.result(timeout=30)
            with client_of(state.url) as client:
                assert client.dbsize() == 60
        finally:
            broker.stop()


def test_what_has_been_read_is_known_while_the_data_are_read(data_dir: Path, slow_loader: Path) -> None:
    broker = EmbeddedBroker(data_dir, binary=slow_loader)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(broker.start)
        try:
            url = f"unix://{data_dir}/run/broker.sock"
            wait_until(lambda: is_loading(url))
            with client_of(url) as client:
                first = wait_until(lambda: module._loaded_bytes(client) or 0, what="something to be read")
                wait_until(lambda: (module._loaded_bytes(client) or 0) > first, what="more to be read")
                client.config_set("key-load-delay", "0")
            started.result(timeout=30)
        finally:
            broker.stop()


def test_a_start_is_waited_for_while_the_server_reads_on() -> None:
    patience = module._Patience(0.0)
    assert not patience.is_over(module._START_BOUND_S, loaded_bytes=None)
    patience.loads()
    for number in range(1, 100):  # given: something new just before the bound, each time
        assert not patience.is_over(number * (module._LOADING_BOUND_S - 1), loaded_bytes=number)
    last_s = 99 * (module._LOADING_BOUND_S - 1)
    assert not patience.is_over(last_s + module._LOADING_BOUND_S, loaded_bytes=99)
    assert not patience.is_over(last_s + module._LOADING_BOUND_S, loaded_bytes=None)
    assert patience.is_over(last_s + module._LOADING_BOUND_S + 1, loaded_bytes=None)


def test_a_server_that_does_not_listen_is_waited_for_no_longer_than_its_bound() -> None:
    patience = module._Patience(0.0)
    assert not patience.is_over(module._START_BOUND_S - 1, loaded_bytes=None)
    assert patience.is_over(module._START_BOUND_S + 1, loaded_bytes=None)


def test_whoever_wants_to_stop_need_not_wait_until_the_data_are_read(data_dir: Path, slow_loader: Path) -> None:
    stop = threading.Event()
    broker = EmbeddedBroker(data_dir, binary=slow_loader, should_stop=stop.is_set)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(broker.start)
        wait_until(lambda: is_loading(f"unix://{data_dir}/run/broker.sock"))
        stop.set()
        with pytest.raises(BrokerUnreachable, match="stopped before it was ready"):
            started.result(timeout=30)
    assert not is_locked(data_dir / "owner.lock")


def test_reading_the_data_has_a_bound(data_dir: Path, slow_loader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOADING_BOUND_S", 0.1)
    with pytest.raises(BrokerUnreachable, match=r"was not ready in 0\.1 s"):
        EmbeddedBroker(data_dir, binary=slow_loader).start()
    assert not is_locked(data_dir / "owner.lock")
