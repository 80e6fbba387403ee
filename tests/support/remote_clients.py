"""diffusers' own remote clients, run as their users run them: in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def answers_of(
    client: ModuleType, cases: Sequence[Mapping[str, Any]], *, folder: Path, environment: Mapping[str, str]
) -> dict[str, Any]:
    """What `client`, a script of tests/gateway, got for each of its cases. `folder` has their files."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(client.__file__)],
        input=json.dumps({"cases": cases, "out": str(folder / "answers.pt")}),
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    got: dict[str, Any] = torch.load(folder / "answers.pt", weights_only=True)
    return got
