"""Temporary folders that a killed worker left: the next one that starts removes them."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from worker import __main__ as worker_main
from worker import temporary_folders
from worker.temporary_folders import remove_abandoned

DAY_S = 86_400.0


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def made(temporary: Path, name: str, *, folder_age_s: float, file_age_s: float | None = None) -> Path:
    """A folder, with a file in it if that has an age."""
    folder = temporary / name
    folder.mkdir()
    now = time.time()
    if file_age_s is not None:
        (folder / "video.mp4").write_bytes(b"frames")
        os.utime(folder / "video.mp4", (now - file_age_s, now - file_age_s))
    os.utime(folder, (now - folder_age_s, now - folder_age_s))
    return folder


def test_only_folders_in_which_nothing_was_written_for_a_day_are_removed(temporary: Path) -> None:
    gone = [
        made(temporary, "latentq-video-a", folder_age_s=2 * DAY_S, file_age_s=2 * DAY_S),
        made(temporary, "latentq-video-b", folder_age_s=2 * DAY_S),
    ]
    kept = [
        made(temporary, "latentq-video-c", folder_age_s=60.0),
        made(temporary, "latentq-video-d", folder_age_s=2 * DAY_S, file_age_s=60.0),
        made(temporary, "another-video-e", folder_age_s=2 * DAY_S),
    ]
    link, target = temporary / "latentq-video-f", made(temporary, "target", folder_age_s=2 * DAY_S)
    link.symlink_to(target)
    assert remove_abandoned() == len(gone)
    assert [path.exists() for path in gone] == [False, False]
    assert [path.exists() for path in (*kept, link, target)] == [True] * 5


def test_those_of_another_user_stay(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = made(temporary, "latentq-video-a", folder_age_s=2 * DAY_S)
    monkeypatch.setattr(os, "getuid", lambda: theirs.stat().st_uid + 1)
    assert remove_abandoned() == 0
    assert theirs.exists()


@pytest.mark.parametrize(("error", "actions"), [(PermissionError, ["temporary_kept"]), (FileNotFoundError, [])])
def test_one_that_cannot_be_removed_or_is_gone_keeps_no_worker_from_starting(
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[OSError],
    actions: list[str],
) -> None:
    made(temporary, "latentq-video-a", folder_age_s=2 * DAY_S)

    def failing(path: Path) -> None:
        raise error(str(path))

    monkeypatch.setattr(shutil, "rmtree", failing)
    with caplog.at_level(logging.INFO, logger=temporary_folders.logger.name):
        assert remove_abandoned() == 0
    assert [getattr(record, "action", None) for record in caplog.records] == actions


def test_a_worker_that_starts_removes_them(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = made(temporary, "latentq-video-a", folder_age_s=2 * DAY_S)
    monkeypatch.chdir(temporary)
    monkeypatch.setattr(worker_main, "configure_logging", lambda settings: None)  # it is the whole process's
    monkeypatch.setenv("LATENTQ_DATA_DIR", str(temporary / "data"))
    assert worker_main.main(["--vae", "demo"]) == 75  # no broker runs
    assert "[broker_not_running]" in capsys.readouterr().err
    assert not left.exists()
