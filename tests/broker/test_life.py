"""What the embedded broker promises, on real servers: starting, stopping, and its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker_config.broker_folder import find_running
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import (
    BrokerNotRunning,
    ConfigurationError,
)
from broker_config.supported_servers import verify_server
from tests.support.embedded_brokers import (
    MIB,
    Owner,
    client_of,
    get,
    has_ended,
    is_locked,
    permissions,
    processes_about,
    put,
    socket_of,
)

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
