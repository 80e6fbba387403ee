"""`python -m tests.chaos.farm`: kills under `latentq generate`, after which nothing may be missing.

Every kill is a SIGKILL at a moment that the seed chooses by how far the run is: of the worker, of a generator process
(which `generate` starts again), or of `generate` itself, which is then run again with the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import redis
from PIL import Image

from broker_config import keys
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.settings import load_settings
from tests.chaos.crew import VAE, Member
from tests.support.generate_command import children_of, generate_command, start_generate
from tests.support.processes import environment_of
from tests.support.tiny_pipelines import save_tiny_pipeline
from tests.support.wait import wait_until

#: Generators stay this close to the worker, so that each kill finds one at work.
_AHEAD: Final = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class FarmPlan:
    """What is to happen."""

    seed: int
    prompts: int
    #: SIGKILLs of the generator process, of `generate` itself, and of the worker.
    generator_kills: int
    command_kills: int
    worker_kills: int
    bound_s: float = 1200.0


@dataclass(slots=True)
class FarmReport:
    """What happened."""

    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    files: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)
    log: str = ""


class FarmStorm:
    """One run of the plan."""

    def __init__(self, plan: FarmPlan, *, say: Callable[[str], None] = lambda words: None) -> None:
        self._plan = plan
        self._say = say
        self._report = FarmReport()
        self._random = random.Random(plan.seed)

    def run(self) -> FarmReport:
        """Everything, from a fresh broker to the last check."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="latentq-chaos-farm-") as name:
            folder = Path(name)
            with EmbeddedBroker(folder / "broker", max_memory_bytes=512 << 20) as broker:
                settings = load_settings(redis_url=broker.url, lease_s=2.0, lease_renew_s=0.5, _env_file=None)
                environment = environment_of(settings) | {VAE: "demo", "LATENTQ_DATA_DIR": str(folder / "data")}
                crew = [
                    Member(kind=kind, number=0, environment=environment, log=folder / f"{kind}.log")
                    for kind in ("worker", "janitor")
                ]
                for member in crew:
                    member.start()
                try:
                    self._storm(folder, environment, worker=crew[0])
                finally:
                    for member in reversed(crew):
                        member.end()
                with redis.Redis.from_url(broker.url) as admin:
                    self._check(folder, admin)
        self._report.seconds = time.monotonic() - began
        return self._report

    def _storm(self, folder: Path, environment: dict[str, str], *, worker: Member) -> None:
        plan = self._plan
        pipeline = save_tiny_pipeline(folder / "pipeline")
        prompts = folder / "prompts.txt"
        # Every tenth prompt is there twice.
        prompts.write_text("".join(f"a picture number {n - n % 10 // 9} of a fox\n" for n in range(plan.prompts)))
        command = generate_command(pipeline=pipeline, prompts=prompts, out=folder / "out")
        command += ["--max-ahead", str(_AHEAD)]
        log = folder / "generate.log"
        todo = self._moments()

        def start() -> subprocess.Popen[bytes]:
            self._report.runs += 1
            return start_generate(command, environment=environment, log=log)

        process = start()

        def is_over() -> bool:
            nonlocal process
            ended = process.poll()
            if ended == 0:
                if todo:  # faster than the kills
                    self._report.problems.append(f"{len(todo)} kills came too late")
                return True
            if ended not in (None, -signal.SIGKILL):
                self._report.problems.append(f"generate ended with status {ended}")
                return True
            if ended is not None:
                process = start()
            if todo and self._rows(folder) >= todo[0][0]:
                self._strike(todo.pop(0)[1], process, worker)
            return False

        try:
            wait_until(is_over, timeout_s=plan.bound_s, what="the last picture")
        except AssertionError as error:
            self._report.problems.append(str(error))
        finally:
            process.kill()
            process.wait()
        self._report.log = log.read_text()

    def _moments(self) -> list[tuple[int, str]]:
        """(rows of the manifest, what is killed then), in order."""
        plan = self._plan
        kinds = ["generator"] * plan.generator_kills + ["generate"] * plan.command_kills
        kinds += ["worker"] * plan.worker_kills
        self._random.shuffle(kinds)
        rows = sorted(self._random.sample(range(1, plan.prompts * 9 // 10), len(kinds)))
        return list(zip(rows, kinds, strict=True))

    def _strike(self, kind: str, process: subprocess.Popen[bytes], worker: Member) -> None:
        if kind == "worker":
            worker.kill()
            worker.start()
        elif kind == "generate":
            process.kill()
            process.wait()
        else:
            # The last kill may be so short ago that the next generator is not there yet.
            for pid in wait_until(lambda: children_of(process.pid), what="a generator to kill"):
                os.kill(pid, signal.SIGKILL)
        self._report.kills[kind] += 1
        self._say(f"killed {kind}")

    def _rows(self, folder: Path) -> int:
        try:
            return (folder / "out" / "manifest.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def _check(self, folder: Path, admin: redis.Redis) -> None:
        report, plan = self._report, self._plan
        out = folder / "out"
        files = {path.name for path in out.iterdir()} - {"manifest.jsonl"}
        rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        report.files, report.rows = len(files), len(rows)
        problems = report.problems
        if len(rows) != plan.prompts or len(files) != plan.prompts:
            problems.append(f"{plan.prompts} prompts: {len(files)} files, {len(rows)} rows")
        for what in ("job_id", "file"):
            double = [value for value, count in Counter(row[what] for row in rows).items() if count > 1]
            if double:
                problems.append(f"{what} twice: {double[:3]}")
        if files != {row["file"] for row in rows}:
            problems.append(f"files and rows differ: {sorted(files ^ {row['file'] for row in rows})[:3]}")
            return
        for row in rows:
            data = (out / row["file"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                problems.append(f"{row['file']} is not what its row says")
            elif (prompt := Image.open(io.BytesIO(data)).info.get("prompt")) != row["prompt"]:
                problems.append(f"{row['file']} shows {prompt!r}")
        jobs = {key.decode().removeprefix(keys.job("")) for key in admin.scan_iter(keys.job("*"), count=1000)}
        again = sorted(jobs - {row["job_id"] for row in rows})
        if again:
            problems.append(f"{len(again)} prompts were made more than once: {again[:3]}")


def main() -> int:
    """Runs the storm that the arguments describe."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.farm")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--kills", type=int, default=5, help="of generators, and as many of the worker")
    parser.add_argument("--command-kills", type=int, default=2, help="of `generate` itself")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    plan = FarmPlan(
        seed=arguments.seed,
        prompts=arguments.prompts,
        generator_kills=arguments.kills,
        command_kills=arguments.command_kills,
        worker_kills=arguments.kills,
    )
    report = FarmStorm(plan, say=print).run()
    print(f"seed {plan.seed}: {plan.prompts} prompts in {report.seconds:.0f} s, {report.runs} runs of generate")
    print(f"SIGKILLs: {dict(report.kills)}")
    print(f"{report.files} files, {report.rows} rows of the manifest")
    for problem in report.problems:
        print(f"PROBLEM {problem}")
    if report.problems:
        print(report.log)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
