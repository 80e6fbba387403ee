"""A worker without usable weights says so in one line, with the catalogue's entry and the folder, and ends with 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from broker_config.embedded_broker import EmbeddedBroker
from broker_config.settings import Settings, load_settings
from producer import DecodeClient, JobStatus
from tests.support.processes import ROOT, WorkerProcesses, environment_of
from tests.support.serving import PATIENCE_S

#: Starts one worker after the other in one process (importing torch takes seconds) and says how each ended.
_STARTS = """
import contextlib, io, json, sys, traceback
from worker.__main__ import main
ends = {}
for name in sys.argv[1:]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            status = main(["--vae", name])
        except Exception:  # what Python itself would make of it
            traceback.print_exc()
            status = 1
    ends[name] = [status, said.getvalue()]
print(json.dumps(ends))
"""
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def broken_catalog(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good `sd`, and VAEs whose folders are each broken in another way."""
    folder = tmp_path_factory.mktemp("broken-vaes")
    good = tiny_catalog.parent / "sd"
    text = ""
    for name in ("sd", "gone", "empty", "cut", "no-header", "other-class", "other-channels", "other-shapes", "no-json"):
        own = folder / name
        text += f'[{name}]\ntitle = "{name}"\nweights = "{own}"\nvae_class = "AutoencoderKL"\n'
        text += 'channels = 4\nspatial = 8\nlayouts = ["unpacked"]\n\n'
        if name == "empty":
            own.mkdir()
        elif name != "gone":
            shutil.copytree(good, own)
    whole = (good / WEIGHTS).read_bytes()
    (folder / "cut" / WEIGHTS).write_bytes(whole[:-100])
    (folder / "no-header" / WEIGHTS).write_bytes(whole[:50])
    config = json.loads((good / "config.json").read_text())
    (folder / "other-class" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    (folder / "other-channels" / "config.json").write_text(json.dumps(config | {"latent_channels": 16}))
    (folder / "other-shapes" / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 8, 16, 32]}))
    (folder / "no-json" / "config.json").write_text("[]")
    catalog = folder / "catalog.toml"
    catalog.write_text(text)
    return catalog


@pytest.fixture
def broken_settings(settings: Settings, broken_catalog: Path) -> Settings:
    return settings.model_copy(update={"catalog": broken_catalog})


@pytest.fixture
def broken_workers(broken_settings: Settings) -> Iterator[WorkerProcesses]:
    started = WorkerProcesses(broken_settings)
    yield started
    started.stop_all()


def test_a_worker_whose_vaes_have_no_weights_ends_with_2(broken_workers: WorkerProcesses, broken_catalog: Path) -> None:
    process = broken_workers.start("gone", "empty", ready=False)
    assert process.wait(timeout=PATIENCE_S) == 2
    log = broken_workers.log(process)
    last = log.splitlines()[-1]
    assert last.startswith("latentq worker: ")
    assert last.endswith("[weights_missing]")
    for name in ("gone", "empty"):
        assert f"VAE {name} in {broken_catalog.parent / name}" in last
        assert f"[{name}] in the catalogue" in last
    assert "Traceback" not in log


def test_a_worker_with_usable_weights_for_one_of_its_vaes_serves_that_one(
    client: DecodeClient, broken_workers: WorkerProcesses, broken_catalog: Path
) -> None:
    process = broken_workers.start("gone", "other-channels", "sd")
    job = client.submit(torch.zeros(1, 4, 8, 8), vae="sd")
    assert job.wait(timeout=PATIENCE_S).status is JobStatus.SUCCEEDED
    assert client.store.served(["sd", "gone", "other-channels"]) == {"sd"}
    log = broken_workers.log(process)
    assert f"VAE gone in {broken_catalog.parent / 'gone'}" in log
    assert "weights of VAE other-channels have 16 latent channels" in log


#: What the last line must say of each, beside the VAE's name.
MISFITS = {
    "cut": "cut",
    "no-header": "no-header",
    "other-class": "of class AutoencoderTiny, the catalogue says AutoencoderKL",
    "other-channels": "16 latent channels, the catalogue says 4",
    "other-shapes": "other-shapes",
    "no-json": "no-json",
}


@pytest.fixture(scope="module")
def ends(broker_server: EmbeddedBroker, broken_catalog: Path) -> dict[str, tuple[int, str]]:
    """Exit status and standard error of a worker for each of the misfits."""
    settings = load_settings(redis_url=broker_server.url, catalog=broken_catalog)
    done = subprocess.run(
        [sys.executable, "-c", _STARTS, *MISFITS],
        env=environment_of(settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_are_not_what_the_catalogue_says_end_the_worker_with_2(
    ends: dict[str, tuple[int, str]], broken_catalog: Path, name: str
) -> None:
    status, said = ends[name]
    last = said.splitlines()[-1]
    assert "Traceback" not in said
    assert last.startswith("latentq worker: ")
    assert f"VAE {name} " in last
    assert MISFITS[name] in last.replace(f"VAE {name}", "")
    assert last.endswith("[weights_mismatch]")
    assert status == 2
