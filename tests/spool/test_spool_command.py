"""`latentq spool`: what a person sees of the spool, and sends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from producer import DecodeClient
from producer.cli import app
from producer.spool import Spool
from producer.spool_flush import SpoolingSubmits

LATENTS = np.ones((1, 4, 8, 8), dtype=np.float32)


@pytest.fixture(autouse=True)
def environment(broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTQ_REDIS_URL", broker_url)
    monkeypatch.setenv("LATENTQ_SPOOL_DIR", str(tmp_path / "spool"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


def latentq(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def keep(job_id: str, tmp_path: Path) -> Path:
    client = DecodeClient.from_env()
    attempt = client.attempt(client.taken(LATENTS), vae="sd", job_id=job_id)
    client.close()
    return Spool(tmp_path / "spool").keep(attempt.request, attempt.tensor)


def test_list_shows_what_waits_and_flush_hands_it_over(tmp_path: Path) -> None:
    assert "nothing waits" in latentq("spool", "list").stderr
    keep("first", tmp_path)
    keep("second", tmp_path)
    shown = latentq("spool", "list").stdout
    assert "first" in shown
    assert "second" in shown
    entries = json.loads(latentq("spool", "list", "--json").stdout)
    assert [(entry["job_id"], entry["aside"]) for entry in entries] == [("first", False), ("second", False)]
    done = latentq("spool", "flush")
    assert (done.exit_code, sorted(done.stdout.split())) == (0, ["first", "second"])
    assert "2 jobs handed over, 0 left" in done.stderr
    with DecodeClient.from_env() as client:
        assert client.job("first").status() == "queued"


def test_flush_counts_what_it_hands_over_since_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        keep(f"job-{number}", tmp_path)
    monkeypatch.setattr(SpoolingSubmits, "_flush_later", lambda self: pytest.fail("a thread hands over beside it"))
    done = latentq("spool", "flush")
    assert (done.exit_code, len(done.stdout.split())) == (0, 3)


def test_flush_says_what_was_set_aside(tmp_path: Path) -> None:
    path = keep("damaged", tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    done = latentq("spool", "flush")
    assert done.exit_code == 1
    assert "set aside" in done.stderr
    assert "set aside" in latentq("spool", "list").stdout


def test_flush_without_a_broker_keeps_everything_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep("kept", tmp_path)
    monkeypatch.setenv("LATENTQ_REDIS_URL", "unix:///nowhere/broker.sock")
    done = latentq("spool", "flush")
    assert done.exit_code == 1
    assert "[broker_unreachable]" in done.stderr
    assert "0 jobs handed over, 1 left" in done.stderr


def test_submit_says_when_it_went_to_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"latents": LATENTS}, tmp_path / "latents.safetensors")
    monkeypatch.setenv("LATENTQ_REDIS_URL", "unix:///nowhere/broker.sock")
    done = latentq("submit", "latents.safetensors", "--vae", "sd", "--id", "mine")
    assert (done.exit_code, done.stdout.strip()) == (0, "mine")
    assert "latentq spool flush" in done.stderr
    assert [entry.job_id for entry in Spool(tmp_path / "spool").entries()] == ["mine"]


def test_without_a_spool_the_command_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENTQ_SPOOL_DIR")
    done = latentq("spool", "list")
    assert done.exit_code != 0
    assert "LATENTQ_SPOOL_DIR" in str(done.exception)
