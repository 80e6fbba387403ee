"""What the embedded broker promises, on real servers: an owner that dies takes it along."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from broker_config import broker_folder
from broker_config import embedded_broker as module
from broker_config.broker_folder import find_running
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import (
    ConfigurationError,
)
from tests.support.embedded_brokers import (
    Owner,
    client_of,
    get,
    has_ended,
    is_locked,
    processes_about,
    put,
)
from tests.support.wait import wait_until

# An owner that dies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["main", "thread"])  # the kernel's signal, and the watcher
def test_the_server_ends_when_its_owner_is_killed(data_dir: Path, binary: Path, where: str) -> None:
    with Owner(data_dir, binary, where=where) as owner:
        state = owner.state()
        put(state.url, "a", "b")
        owner.kill()
    wait_until(lambda: has_ended(state.pid))
    wait_until(lambda: not processes_about(data_dir))
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        assert get(broker.url, "a") == "b"


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_new_owner_may_start_at_once(data_dir: Path, binary: Path, where: str) -> None:
    pids = set()
    for number in range(3):
        with Owner(data_dir, binary, where=where) as owner:
            state = owner.state()
            pids.add(state.pid)
            with client_of(state.url) as client:
                assert client.rpush("list", number) == number + 1
            owner.kill()
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        assert broker.start().pid not in pids
        with client_of(broker.url) as client:
            assert client.lrange("list", 0, -1) == ["0", "1", "2"]


def test_a_new_owner_waits_until_the_old_server_has_ended(data_dir: Path, binary: Path) -> None:
    with Owner(data_dir, binary) as owner:
        old = owner.state()
        put(old.url, "a", "b")
        os.kill(old.pid, signal.SIGSTOP)  # given: a server that takes its time to shut down
        owner.kill()
    with Owner(data_dir, binary) as owner:
        wait_until(lambda: is_locked(data_dir / "owner.lock"))
        assert is_locked(data_dir / "server.lock")
        assert not has_ended(old.pid)
        assert not owner.has_said_something()
        assert processes_about(data_dir) == {old.pid, owner.process.pid}
        os.kill(old.pid, signal.SIGCONT)
        new = owner.state()
        wait_until(lambda: has_ended(old.pid))
        assert new.pid != old.pid
        assert get(new.url, "a") == "b"


def test_a_server_that_nobody_told_to_stop_is_shut_down_by_the_next_owner(
    data_dir: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_folder, "_ORPHAN_GRACE_S", 0.05)
    with Owner(data_dir, binary, where="thread") as owner:
        old = owner.state()
        put(old.url, "a", "b")
        (watcher,) = processes_about(data_dir) - {old.pid, owner.process.pid}
        os.kill(watcher, signal.SIGKILL)
        owner.kill()
    assert find_running(data_dir) == old
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        assert broker.start().pid != old.pid
        wait_until(lambda: has_ended(old.pid))
        assert get(broker.url, "a") == "b"


def test_a_server_that_cannot_be_shut_down_is_never_joined_by_a_second(
    data_dir: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("_ORPHAN_GRACE_S", "_ANSWER_BOUND_S"):
        monkeypatch.setattr(broker_folder, bound, 0.05)
    monkeypatch.setattr(module, "_STOP_BOUND_S", 0.05)
    with Owner(data_dir, binary) as owner:
        old = owner.state()
        os.kill(old.pid, signal.SIGSTOP)
        owner.kill()
    try:
        with pytest.raises(ConfigurationError, match="does not stop"):
            EmbeddedBroker(data_dir, binary=binary).start()
        assert processes_about(data_dir) == {old.pid}
    finally:
        os.kill(old.pid, signal.SIGCONT)


def test_it_outlives_its_owner_only_where_asked_to(data_dir: Path, binary: Path) -> None:
    with Owner(data_dir, binary, dies=False) as owner:
        state = owner.state()
        owner.kill()
    try:
        with pytest.raises(ConfigurationError, match=f"pid {state.pid}"):
            EmbeddedBroker(data_dir, binary=binary).start()
        assert find_running(data_dir) == state
    finally:
        os.kill(state.pid, signal.SIGTERM)
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        assert broker.start().pid != state.pid


def test_it_outlives_the_thread_that_started_it(data_dir: Path, binary: Path) -> None:
    broker = EmbeddedBroker(data_dir, binary=binary)
    thread = threading.Thread(target=broker.start, name="starter")
    thread.start()
    thread.join()
    try:
        with client_of(broker.url) as client:  # a second of uptime: its loop has looked for signals ten times
            wait_until(lambda: client.info("server")["uptime_in_seconds"] >= 2)
        assert find_running(data_dir) == broker.start()
    finally:
        broker.stop()


def test_the_watcher_spares_a_process_that_got_the_server_s_pid(tmp_path: Path) -> None:
    lock = tmp_path / "server.lock"
    with subprocess.Popen(["sleep", "1000"]) as other, lock.open("w") as file:
        no_owner = "0"
        watcher = [sys.executable, "-I", "-S", "-c", module._WATCHER, no_owner, str(other.pid), str(lock)]
        subprocess.run(watcher, check=True)
        assert other.poll() is None
        fcntl.flock(file, fcntl.LOCK_EX)  # as a server that lives does
        subprocess.run(watcher, check=True)
        assert other.wait() == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_server_whose_owner_died_before_it_could_ask_for_the_signal_does_not_start() -> None:
    not_the_parent = os.getppid()
    in_child = module._signal_at_death_of(not_the_parent)
    assert subprocess.run(["true"], preexec_fn=in_child).returncode == 1
    assert subprocess.run(["true"], preexec_fn=module._signal_at_death_of(os.getpid())).returncode == 0
