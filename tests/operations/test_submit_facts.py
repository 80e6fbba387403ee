"""`latentq submit` takes every fact that a layout needs, and the job carries it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from broker_config.latent_geometry import FACTS, LAYOUTS
from producer import DecodeClient
from tests.operations.conftest import Run
from tests.support.latent_facts import CASES


def flags(said: dict[str, object]) -> list[str]:
    return [
        part
        for name, value in said.items()
        for part in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_fact_on_the_command_line_is_in_the_job(name: str, cli: Run, client: DecodeClient, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "latents.safetensors"
    save_file({"latents": np.ones(case.shape, dtype=np.float32)}, path)
    done = cli("submit", str(path), *flags(dict(case.said)))
    assert done.exit_code == 0, done.output
    request = client.job(done.stdout.split()[0]).snapshot().request
    assert request is not None
    assert {key: getattr(request, key) for key in case.said} == dict(case.said)


def test_every_fact_is_among_these() -> None:
    said = {key for case in CASES.values() for key in case.said}
    needed = {key for form in LAYOUTS.values() for key in form.needs}
    assert set(FACTS) | needed <= said


def test_a_pipelines_name_and_its_facts_go_together(cli: Run, client: DecodeClient, tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    save_file({"latents": np.ones((1, 4, 16, 6, 8), dtype=np.float32)}, path)
    done = cli("submit", str(path), "--pipeline", "CogVideoXPipeline", "--additional-frames", "1")
    request = client.job(done.stdout.split()[0]).snapshot().request
    assert request is not None
    assert (request.vae, request.layout, request.additional_frames, request.num_frames) == (
        "cogvideox-5b",
        "frames_first",
        1,
        9,
    )
