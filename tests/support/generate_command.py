"""`latentq generate` as a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_PROGRAM = "import sys; from producer.cli import main; sys.argv[0] = 'latentq'; main()"


def generate_command(*, pipeline: Path, prompts: Path | str, out: Path | str, vae: str | None = "demo") -> list[str]:
    """The command with few steps, on a CPU."""
    command = [sys.executable, "-c", _PROGRAM, "generate", "--pipeline", str(pipeline), "--prompts", str(prompts)]
    command += ["--out", str(out), "--steps", "2", "--devices", "cpu"]
    return command if vae is None else [*command, "--vae", vae]


def start_generate(command: list[str], *, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts it; everything it says goes to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(command, env=dict(environment), stdout=file, stderr=file, cwd=log.parent)


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and that still run."""
    found: set[int] = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # this thread has ended by now
            found |= {int(word) for word in thread.read_text().split()}
    return sorted(found)
