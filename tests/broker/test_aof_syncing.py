"""What the thread that syncs the append-only file does about files that cannot be synced."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from broker_config.aof_syncing import AofSyncing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).write_text("commands")
    return tmp_path


def actions(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str | None]]:
    return [(record.levelno, getattr(record, "action", None)) for record in caplog.records]


def test_each_file_is_synced_once_until_it_grows(folder: Path) -> None:
    syncing = AofSyncing(folder)
    assert syncing.sync() == ["a", "b"]
    assert syncing.sync() == []
    (folder / "b").write_text("more commands")
    assert syncing.sync() == ["b"]


def test_a_sync_that_fails_is_an_error_stops_no_other_and_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, fsync = os.stat(folder / "a").st_ino, os.fsync

    def failing(file: int) -> None:
        if os.fstat(file).st_ino == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(file)

    syncing = AofSyncing(folder)
    with monkeypatch.context() as patched, caplog.at_level(logging.DEBUG):
        patched.setattr(os, "fsync", failing)
        assert syncing.sync() == ["b"]
    assert actions(caplog) == [(logging.ERROR, "aof_sync_failed")]
    assert str(folder / "a") in caplog.text
    assert syncing.sync() == ["a"]


def test_a_file_that_a_rewrite_takes_away_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listed = sorted(folder.glob("*"))
    (folder / "a").unlink()
    with monkeypatch.context() as patched, caplog.at_level(logging.DEBUG):
        patched.setattr(Path, "glob", lambda *_: iter(listed))
        assert AofSyncing(folder).sync() == ["b"]
    assert actions(caplog) == [(logging.DEBUG, "aof_not_synced")]
