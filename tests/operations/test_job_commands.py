"""`latentq redecode`, `result` and what takes a secret's file: options, and files that cannot be read or written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from broker_config.errors import InvalidOption
from producer import DecodeClient
from tests.operations.conftest import Made, Run


def said(done: object) -> str:
    """What the command would print of its error."""
    error = done.exception  # type: ignore[attr-defined]
    assert isinstance(error, InvalidOption)
    return error.message


def test_redecode_takes_what_submit_takes_but_what_belongs_to_the_latents(
    cli: Run, client: DecodeClient, made: Made
) -> None:
    made.queued("first", "sd", provenance=False, metadata={"prompt": "a fox"})
    done = cli(
        *("redecode", "first", "--id", "second", "--allow-tiling", "--scaling-factor", "0.5", "--start-within", "60"),
        *("--output", "webp", "--retention", "120"),
    )
    assert (done.exit_code, done.stdout.strip()) == (0, "second")
    request = client.job("second").snapshot().request
    assert request is not None
    assert (request.allow_tiling, request.scaling_factor, request.start_within_s) == (True, 0.5, 60.0)
    assert (request.output, request.retention_s, request.source_job_id) == ("webp", 120.0, "first")
    # what is not named stays as it was
    assert (request.provenance, dict(request.metadata)) == (False, {"prompt": "a fox"})
    assert cli("redecode", "second", "--id", "third", "--provenance").exit_code == 0
    third = client.job("third").snapshot().request
    assert third is not None
    assert (third.provenance, third.allow_tiling, third.output) == (True, True, "webp")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_of_a_secret_that_cannot_be_read_is_named(cli: Run, tmp_path: Path, content: bytes | None) -> None:
    save_file({"latents": np.zeros((1, 4, 8, 8), np.float32)}, tmp_path / "latents.safetensors")
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    submitted = cli(
        "submit",
        "latents.safetensors",
        "--vae",
        "sd",
        "--webhook",
        "https://a.example",
        "--webhook-secret-file",
        "secret",
    )
    added = cli("webhooks", "secrets", "add", "--file", "secret")
    for done in (submitted, added):
        assert "secret cannot be read" in said(done)


def test_a_result_that_cannot_be_written_is_said_and_stays(
    cli: Run, client: DecodeClient, made: Made, tmp_path: Path
) -> None:
    made.succeeded("done", "sd")
    (tmp_path / "a file").write_text("")
    done = cli("result", "done", "-o", "a file/picture.png")
    assert "a file/picture.png cannot be written: File exists" in said(done)
    assert client.job("done").status() == "succeeded"
    assert cli("result", "done", "-o", "picture.png").exit_code == 0
