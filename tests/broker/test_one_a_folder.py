"""What the embedded broker promises, on real servers: one broker a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from broker_config import broker_folder
from broker_config.broker_folder import BrokerState, find_running
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import (
    BrokerUnreachable,
    ConfigurationError,
)
from tests.support.embedded_brokers import (
    REPOSITORY,
    Owner,
)

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
        "import sys; from pathlib import Path; from broker_config.broker_folder import find_running\n"
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
    monkeypatch.setattr(broker_folder, "_ANSWER_BOUND_S", 0.1)
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
