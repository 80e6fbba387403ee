"""`latentq generate` as a process: pictures of a file of prompts, kills survived, bad input refused at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker_config.settings import Settings
from producer.prompt_farm.manifest import Manifest
from tests.chaos.farm import FarmPlan, FarmStorm
from tests.support.embedded_brokers import has_ended
from tests.support.generate_command import children_of, generate_command, start_generate
from tests.support.processes import environment_of
from tests.support.s3_server import S3Server, need_s3
from tests.support.thread_worker import ThreadWorker
from tests.support.tiny_pipelines import rename_class, save_tiny_pipeline
from tests.support.wait import wait_until

#: A process imports torch and loads a pipeline, beside other tests.
_BOUND_S = 120.0


@pytest.fixture
def environment(settings: Settings, tmp_path: Path) -> dict[str, str]:
    """Of the command."""
    return environment_of(settings) | {"LATENTQ_DATA_DIR": str(tmp_path / "data"), "LATENTQ_LOG_LEVEL": "WARNING"}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file with twelve prompts."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"fox {number}", "seed": number}) + "\n" for number in range(12)))
    return path


class Command:
    """Runs the command in a test's folder."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.log = folder / "generate.log"
        self._environment = environment
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *more: str, **options: Any) -> subprocess.Popen[bytes]:
        """Starts it."""
        process = start_generate([*generate_command(**options), *more], environment=self._environment, log=self.log)
        self._started.append(process)
        return process

    def run(self, *more: str, **options: Any) -> tuple[int, str]:
        """Runs it to its end. Returns the exit status, and what it said."""
        self.log.unlink(missing_ok=True)
        return self.start(*more, **options).wait(_BOUND_S), self.log.read_text()

    def stop_all(self) -> None:
        """Ends what a failed test has left."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def command(tmp_path: Path, environment: dict[str, str]) -> Iterator[Command]:
    """The command."""
    made = Command(tmp_path, environment)
    yield made
    made.stop_all()


def rows(folder: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    except FileNotFoundError:
        return []


def test_prompts_become_files_a_manifest_and_plain_lines(
    command: Command, worker: ThreadWorker, pipeline_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"pipeline": pipeline_folder, "prompts": prompts, "out": out}
    named = ("--format", "webp", "--name-template", "{seed:02}/{slug}")
    status, said = command.run("--batch-size", "5", *named, **options)
    assert status == 0, said
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.webp"))
    assert files == [f"{number:02}/fox-{number}.webp" for number in range(12)]
    assert sorted(row["file"] for row in rows(out)) == files
    assert sorted((row["seed"], row["prompt"]) for row in rows(out)) == [(n, f"fox {n}") for n in range(12)]
    assert "denoised 12/12, decoded 12/12" in said
    assert "overlap ratio" in said
    assert "\x1b" not in said
    status, said = command.run(*named, **options)
    assert status == 0, said
    assert "12 were finished before" in said
    assert len(rows(out)) == 12


@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "signal 9"), (signal.SIGTERM, "work left")], ids=["killed", "told to end"]
)
def test_a_generator_that_is_killed_is_started_again(
    command: Command,
    worker: ThreadWorker,
    pipeline_folder: Path,
    prompts: Path,
    tmp_path: Path,
    number: signal.Signals,
    how: str,
) -> None:
    out = tmp_path / "out"
    worker.gate.close()
    process = command.start("--max-ahead", "2", pipeline=pipeline_folder, prompts=prompts, out=out)
    assert worker.gate.reached.wait(_BOUND_S)
    (child,) = children_of(process.pid)
    told = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    assert b"OMP_WAIT_POLICY=PASSIVE" in told, "a worker may compute on the same cores"
    os.kill(child, number)
    worker.gate.open()
    assert process.wait(_BOUND_S) == 0, command.log.read_text()
    assert f"ended with {how}; another one is started" in command.log.read_text()
    assert sorted(row["prompt"] for row in rows(out)) == sorted(f"fox {number}" for number in range(12))


def test_a_command_that_is_killed_takes_its_generator_along_and_goes_on_where_it_was(
    command: Command, worker: ThreadWorker, pipeline_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"pipeline": pipeline_folder, "prompts": prompts, "out": out}
    worker.gate.close()
    process = command.start("--max-ahead", "2", **options)
    assert worker.gate.reached.wait(_BOUND_S)
    (child,) = children_of(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: has_ended(child), what="the end of the generator")
    worker.gate.open()
    with (out / "manifest.jsonl").open("ab") as manifest:
        manifest.write(b'{"job_id": "farm-torn')
    status, said = command.run(**options)
    assert status == 0, said
    assert "last line was torn (21 bytes): cut off" in said
    assert "adopted" in said
    assert sorted(row["prompt"] for row in rows(out)) == sorted(f"fox {number}" for number in range(12))
    assert len(list(out.glob("*.png"))) == 12


def test_ctrl_c_submits_what_is_denoised_and_the_same_command_goes_on(
    command: Command, worker: ThreadWorker, pipeline_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"pipeline": pipeline_folder, "prompts": prompts, "out": out}
    worker.gate.close()
    process = command.start("--max-ahead", "2", **options)
    assert worker.gate.reached.wait(_BOUND_S)
    process.send_signal(signal.SIGINT)
    assert process.wait(_BOUND_S) == 130, command.log.read_text()
    assert "stopping: what is being denoised is still submitted" in command.log.read_text()
    worker.gate.open()
    status, said = command.run(**options)
    assert status == 0, said
    assert sorted(row["seed"] for row in rows(out)) == list(range(12))
    assert len([row for row in rows(out) if row["timings_s"]["denoise"] is None]) >= 1


def test_two_generators_share_the_prompts(
    command: Command, worker: ThreadWorker, pipeline_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    # No other option of devices: the later one counts.
    options = {"pipeline": pipeline_folder, "prompts": prompts, "out": tmp_path / "out"}
    status, said = command.run("--devices", "cpu,cpu", "--max-ahead", "4", **options)
    assert status == 0, said
    assert "on cpu, cpu #2" in said
    assert sorted(row["seed"] for row in rows(tmp_path / "out")) == list(range(12))


def test_pictures_and_manifest_go_to_a_bucket(
    command: Command, worker: ThreadWorker, pipeline_folder: Path, prompts: Path, tmp_path: Path, environment: Any
) -> None:
    need_s3()
    with S3Server() as server:
        server.make_bucket("pictures")
        environment |= {
            "LATENTQ_S3_ENDPOINT": server.endpoint,
            "LATENTQ_S3_ALLOW_HTTP": "true",
            "LATENTQ_S3_REGION": "us-east-1",
            "LATENTQ_S3_ACCESS_KEY_ID": "AKIATESTTESTTEST",
            "LATENTQ_S3_SECRET_ACCESS_KEY": "secret",
        }
        options = {"pipeline": pipeline_folder, "prompts": prompts, "out": "s3://pictures/run/1"}
        status, said = command.run("--name-template", "{seed}", **options)
        assert status == 0, said
        files = {f"run/1/{number}.png" for number in range(12)}
        assert server.keys("pictures") == files | {"run/1/manifest.jsonl"}
        # Another machine knows what is finished by the copy in the bucket.
        shutil.rmtree(tmp_path / "data")
        status, said = command.run("--name-template", "{seed}", **options)
        assert status == 0, said
        assert "12 were finished before" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_storm_of_kills_leaves_one_file_and_one_row_for_each_prompt() -> None:
    report = FarmStorm(
        FarmPlan(seed=7, prompts=40, generator_kills=1, command_kills=1, worker_kills=1, bound_s=500)
    ).run()
    assert report.problems == [], report.log
    assert sum(report.kills.values()) == 3
    assert (report.files, report.rows) == (40, 40)


# Refused before the first prompt -------------------------------------------------------------------------


@pytest.fixture
def refused(command: Command, pipeline_folder: Path, prompts: Path, tmp_path: Path) -> Any:
    """Runs a command that must be refused; returns what it said. Nothing may have been denoised: there is no worker,
    so it would wait for results."""

    def run(*more: str, status: int = 1, **options: Any) -> str:
        whole = {"pipeline": pipeline_folder, "prompts": prompts, "out": tmp_path / "out", **options}
        found, said = command.run(*more, **whole)
        assert found == status, said
        assert "Traceback" not in said
        assert rows(tmp_path / "out") == []
        return said.splitlines()[-1]

    return run


def test_a_malformed_row_is_refused(refused: Any, prompts: Path) -> None:
    prompts.write_text('{"prompt": "a fox"}\n{"prompt": "a door", "steps": "many"}\n')
    assert "line 2: steps is 'many', expected a whole number from 1 to 10000 [prompt_row_invalid]" in refused()


def test_a_row_that_the_pipeline_cannot_do_is_refused(refused: Any, prompts: Path) -> None:
    prompts.write_text('{"prompt": "a fox"}\n{"prompt": "a door", "width": 100}\n')
    assert "line 2: width is 100, expected a multiple of 8: 96 or 104 [prompt_row_invalid]" in refused()


def test_a_folder_that_cannot_be_written_is_refused(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused(out=tmp_path / "file" / "out", status=2)


def test_a_folder_another_run_writes_to_is_refused(refused: Any, tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "out" / "manifest.jsonl")
    assert "another run writes to" in refused(status=2)
    manifest.close()


def test_a_bucket_that_is_not_there_is_refused(refused: Any, environment: dict[str, str]) -> None:
    need_s3()
    with S3Server() as server:
        environment |= {"LATENTQ_S3_ENDPOINT": server.endpoint, "LATENTQ_S3_ALLOW_HTTP": "true"}
        environment |= {"LATENTQ_S3_ACCESS_KEY_ID": "a", "LATENTQ_S3_SECRET_ACCESS_KEY": "b"}
        assert "there is no such bucket" in refused(out="s3://nowhere/pictures", status=2)


def test_a_pipeline_whose_latents_no_vae_matches_is_refused(refused: Any) -> None:
    assert "have 16 channels, and VAE sd decodes 4: name the matching entry with --vae" in refused(vae=None)


def test_a_pipeline_without_latents_is_refused(refused: Any, tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "other")
    rename_class(folder, "StableAudioPipeline")
    assert "latents of StableAudioPipeline cannot be decoded here: they are sound" in refused(pipeline=folder)
    rename_class(folder, "DDPMPipeline")
    assert "no pipeline class 'DDPMPipeline' in the table" in refused(pipeline=folder, vae=None)
    # With a VAE named, the table need not know it: its call tells.
    assert "DDPMPipeline takes no prompt" in refused(pipeline=folder)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"vae": "dmeo"}, 1, "no VAE 'dmeo' in the catalogue; near it are demo"),
        ({"pipeline": "/nowhere/at/all"}, 2, "there is no folder /nowhere/at/all"),
        ({"prompts": "/nowhere/prompts.txt"}, 2, "cannot be read: No such file or directory"),
    ],
)
def test_what_is_not_there_is_refused(refused: Any, options: dict[str, str], status: int, words: str) -> None:
    assert words in refused(**options, status=status)


def test_a_folder_that_is_no_pipeline_is_refused(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no model_index.json" in refused(pipeline=tmp_path / "empty", status=2)
    broken = save_tiny_pipeline(tmp_path / "broken")
    shutil.rmtree(broken / "unet")
    assert "cannot be loaded on cpu" in refused(pipeline=broken, status=2)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--name-template", "same"], "makes the same name 'same' of line 1 and line 2: add {id}"),
        (["--name-template", "{prompt}"], "has {prompt}"),
        (["--format", "mp4"], "makes pictures: choose png"),
        (["--devices", "gpu7"], "device 'gpu7' is none"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--mode", "quick"], "mode is 'quick'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_option_that_cannot_be_is_refused(refused: Any, more: list[str], words: str) -> None:
    assert words in refused(*more)
