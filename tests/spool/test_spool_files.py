"""The spool's files: what they are, that death, damage, a full disk and a second flusher lose nothing of them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import redis
import torch
from safetensors import safe_open

from broker_config import keys
from broker_config.errors import ConfigurationError, SpoolUnavailable
from broker_config.messages import SCHEMA_VERSION, DecodeRequest
from broker_config.settings import Settings, load_settings
from producer import DecodeClient
from producer.spool import Spool
from producer.spool_flush import FlushReport, flush
from tests.support.processes import environment_of

LATENTS = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float16)


@pytest.fixture
def settings(broker_url: str) -> Settings:
    return load_settings(redis_url=broker_url, _env_file=None)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def keep(client: DecodeClient, spool: Spool, job_id: str, latents: np.ndarray = LATENTS) -> Path:
    attempt = client.attempt(client.taken(latents), vae="sd", job_id=job_id)
    return spool.keep(attempt.request, attempt.tensor)


def flushed(client: DecodeClient, spool: Spool) -> FlushReport:
    return flush(spool, store=client.store, blobs=client.blobs)


def test_a_file_is_a_safetensors_file_with_the_latents_that_only_its_owner_reads(
    client: DecodeClient, spool: Spool
) -> None:
    path = keep(client, spool, "job")
    with safe_open(path, framework="np") as file:
        assert list(file.keys()) == ["latents"]
        assert np.array_equal(file.get_tensor("latents"), LATENTS)
        assert DecodeRequest.from_wire(file.metadata()["latentq.message"]).job_id == "job"
    assert path.stat().st_mode & 0o077 == 0
    assert spool.folder.stat().st_mode & 0o077 == 0
    assert keep(client, spool, "job") == path
    assert len(spool.entries()) == 1


def test_the_order_of_latents_in_memory_is_kept(client: DecodeClient, spool: Spool) -> None:
    latents = torch.from_numpy(LATENTS).to(memory_format=torch.channels_last)
    attempt = client.attempt(client.taken(latents), vae="sd", job_id="job")
    spool.keep(attempt.request, attempt.tensor)
    [entry] = spool.entries()
    assert spool.read(entry).tensor.data == attempt.tensor.data
    assert flushed(client, spool).sent == ["job"]


@pytest.mark.parametrize("what", ["keep", "flush"])
def test_killed_before_any_line_loses_nothing(what: str, settings: Settings, tmp_path: Path) -> None:
    assert settings.redis_url is not None
    url = settings.redis_url.get_secret_value()
    done = subprocess.run(
        [sys.executable, "-m", "tests.spool.kill_at_line", what, str(tmp_path), url],
        env=environment_of(settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20, "hardly a line was traced"


@pytest.mark.parametrize("at", ["length", "header", "message", "latents", "end"])
def test_a_damaged_file_is_set_aside_whole_and_stops_no_other(at: str, client: DecodeClient, spool: Spool) -> None:
    before, path, after = (keep(client, spool, job_id) for job_id in ("before", "damaged", "after"))
    data = bytearray(path.read_bytes())
    if at == "end":
        del data[-1]
    else:
        place = {
            "length": 0,
            "header": 9,
            "message": data.index(b'\\"height\\":64') + len(b'\\"height\\":6'),
            "latents": len(data) - 2,
        }[at]
        data[place] ^= 1
    path.write_bytes(data)
    report = flushed(client, spool)
    assert sorted(report.sent) == ["after", "before"]
    assert not before.exists()
    assert not after.exists()
    [(where, reason)] = report.aside
    assert where.read_bytes() == data
    [entry] = spool.aside()
    assert entry.job_id == "damaged"
    assert entry.reason is not None
    assert reason in entry.reason
    assert flushed(client, spool) == FlushReport()


def test_an_id_that_was_used_for_other_latents_is_set_aside(client: DecodeClient, spool: Spool) -> None:
    client.submit(LATENTS + 1, vae="sd", job_id="job")
    keep(client, spool, "job")
    [(_, reason)] = flushed(client, spool).aside
    assert "already used" in reason


def test_what_a_newer_latentq_wrote_stays(client: DecodeClient, spool: Spool) -> None:
    attempt = client.attempt(client.taken(LATENTS), vae="sd", job_id="newer")
    newer = dataclasses.replace(attempt.request, schema_version=SCHEMA_VERSION + 1)
    path = spool.keep(newer, attempt.tensor)
    keep(client, spool, "other")
    report = flushed(client, spool)
    assert (report.sent, report.newer, report.aside) == (["other"], [path], [])
    assert path.exists()


def test_a_job_that_the_broker_has_already_leaves_the_spool(client: DecodeClient, spool: Spool) -> None:
    keep(client, spool, "job")
    client.submit(LATENTS, vae="sd", job_id="job")
    assert flushed(client, spool).sent == ["job"]
    assert spool.is_empty()


def test_two_flushers_hand_every_job_over_once(client: DecodeClient, spool: Spool, broker_url: str) -> None:
    ids = [f"job-{number}" for number in range(40)]
    for job_id in ids:
        keep(client, spool, job_id)
    reports: list[FlushReport] = []
    start = threading.Barrier(2)

    def work() -> None:
        start.wait()
        reports.append(flushed(client, spool))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reports[0].sent + reports[1].sent) == sorted(ids)
    assert all(report.stopped_by is None and not report.aside for report in reports)
    assert spool.is_empty()
    with redis.Redis.from_url(broker_url) as admin:
        queued = [
            item.decode() for item in admin.lrange(keys.rq_queue(keys.queue_name("sd", keys.Priority.NORMAL)), 0, -1)
        ]
    assert sorted(queued) == sorted(ids)


def test_what_a_killed_writer_left_goes_after_an_hour_and_a_live_ones_stays(client: DecodeClient, spool: Spool) -> None:
    old, young = spool.folder / ".job.1.part", spool.folder / ".job.2.part"
    for path in (old, young):
        path.write_bytes(b"half")
    hours_ago = time.time() - 2 * 3600
    os.utime(old, (hours_ago, hours_ago))
    assert flushed(client, spool) == FlushReport()
    assert (old.exists(), young.exists()) == (False, True)


def test_a_full_disk_is_said_and_leaves_nothing_behind(client: DecodeClient, spool: Spool) -> None:
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from broker_config.settings import load_settings\n"
        "from broker_config.connection import connect_url\n"
        "from broker_config.errors import SpoolUnavailable\n"
        "from producer import DecodeClient\n"
        "url = 'unix:///nowhere/broker.sock'\n"
        "settings = load_settings(redis_url=url, _env_file=None)\n"
        "client = DecodeClient(connect_url(url, name='t', retries=0), settings=settings, spool=sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    client.submit(np.ones((1, 4, 64, 64), np.float32), vae='sd', job_id='big')\n"
        "except SpoolUnavailable as error:\n"
        "    print(error.job_id, error.code, error.message)\n"
    )
    environment = environment_of(load_settings(redis_url="unix:///nowhere", _env_file=None))
    done = subprocess.run(
        [sys.executable, "-c", code, str(spool.folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("big spool_unavailable the spool"), done.stderr
    for words in ("File too large", "free its disk", "does not answer"):
        assert words in done.stdout
    assert [path.name for path in spool.folder.iterdir()] == ["aside"]


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_submitted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="spool folder"):
        Spool(tmp_path / "file")


def test_a_folder_that_went_away_is_said(client: DecodeClient, spool: Spool) -> None:
    (spool.folder / "aside").rmdir()
    spool.folder.rmdir()
    with pytest.raises(SpoolUnavailable, match="No such file"):
        keep(client, spool, "job")
