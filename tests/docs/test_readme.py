"""The README is true: its blocks run as a reader would run them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from broker_config.broker_folder import find_running
from broker_config.tensor_header import write_header
from tests.support.processes import ROOT
from tests.support.up import free_port
from tests.support.wait import wait_until

README = (ROOT / "README.md").read_text()
LATENTQ = str(Path(sys.executable).parent / "latentq")


def blocks(language: str) -> list[str]:
    """Code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """`latentq up --vae demo`, as the README starts it, with a data folder of its own."""
    folder = tmp_path_factory.mktemp("readme")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LATENTQ_")}
    environment |= {"LATENTQ_DATA_DIR": str(folder / "data"), "PATH": f"{Path(LATENTQ).parent}:{os.environ['PATH']}"}
    environment["LATENTQ_GATEWAY_PORT"] = str(free_port())  # other tests run theirs beside it
    command = blocks("bash")[0].split("#")[0].split()
    assert command[:2] == ["latentq", "up"]
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen([LATENTQ, *command[1:]], env=environment, stdout=log, stderr=log, cwd=folder)
    try:

        def running() -> bool:
            assert process.poll() is None, (folder / "up.log").read_text()
            return find_running(folder / "data" / "broker") is not None

        wait_until(running, timeout_s=60, what="latentq up")
        yield folder, environment
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (folder / "up.log").read_text()


def test_the_python_block_runs(stack: tuple[Path, dict[str, str]]) -> None:
    folder, environment = stack
    (block,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", block], env=environment, cwd=folder, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 3, 256, 384)"
    assert (folder / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_shell_block_runs(stack: tuple[Path, dict[str, str]]) -> None:
    folder, environment = stack
    latents = np.zeros((1, 16, 16, 16), dtype=np.float16)
    (folder / "latents.safetensors").write_bytes(write_header("float16", latents.shape) + latents.tobytes())
    job_id = "ID"
    for line in blocks("bash")[1].splitlines():
        command = line.split("#")[0].split()
        arguments = [job_id if part == "ID" else part for part in command[1:]]
        done = subprocess.run(
            [LATENTQ, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, (line, done.stderr)
        if command[1] == "submit":
            job_id = done.stdout.split()[0]


def test_the_examples_run(stack: tuple[Path, dict[str, str]]) -> None:
    folder, environment = stack

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=150
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    files = run(str(ROOT / "examples" / "overlap.py"), "pictures").split()
    assert sorted(Path(file).name for file in files) == [
        "a-fox-in-the-snow.png",
        "a-lighthouse-at-dusk.png",
        "an-old-map.png",
    ]
    example = str(ROOT / "examples" / "fire_and_forget.py")
    run(example, run(example).strip(), "forgotten.png")
    assert (folder / "forgotten.png").read_bytes()[:4] == b"\x89PNG"
    made = [Path(file).name for file in run(str(ROOT / "examples" / "video.py"), "clip").split()]
    assert made == ["clip.mp4", "last-frame.jpg"]
    assert (folder / "clip" / "clip.mp4").read_bytes()[4:8] == b"ftyp"
    pytest.importorskip("transformers")
    run(str(ROOT / "examples" / "in_place_of_a_vae.py"), "a cup of coffee", "coffee.png")
    with Image.open(folder / "coffee.png") as picture:
        assert picture.size == (256, 256)
        assert len(picture.getcolors(1 << 16) or []) > 1000, "a cup, not a plain colour"


def test_the_catalogue_block_is_a_catalogue(tmp_path: Path) -> None:
    from broker_config.vae_catalog import VaeCatalog

    (block,) = blocks("toml")
    (tmp_path / "own.toml").write_text(block)
    assert VaeCatalog.load(tmp_path / "own.toml")["mine"].channels == 4


def test_every_file_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
