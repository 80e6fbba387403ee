"""The demo's second half: prompts become photographs, denoised by a process of their own and decoded by a worker."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from broker_config.settings import Settings
from producer import DecodeClient
from producer.prompt_demo import run_prompts
from tests.support.demo_photographs import NEEDED_PSNR, photograph, psnr
from tests.support.processes import environment_of
from tests.support.thread_worker import ThreadWorker


def test_prompts_become_photographs(
    client: DecodeClient, settings: Settings, worker: ThreadWorker, tmp_path: Path
) -> None:
    pytest.importorskip("skimage.data")
    said = io.StringIO()
    console = Console(file=said, width=80)
    out = tmp_path / "prompts"
    for _ in range(2):  # the second demo makes them again
        assert run_prompts(out, client, environment=environment_of(settings), console=console) == 0, said.getvalue()
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        name = next(word for word in NEEDED_PSNR if word in row["prompt"])
        picture = np.asarray(Image.open(out / row["file"]))
        # Guidance costs some likeness (producer/demo_pipeline/README.md); another photograph has less than 15 dB.
        assert psnr(picture, photograph(name)) >= NEEDED_PSNR[name] - 5, row["file"]
    assert said.getvalue().count("overlap ratio") == 2
    assert max(len(line) for line in said.getvalue().splitlines() if "/" not in line) <= 80
