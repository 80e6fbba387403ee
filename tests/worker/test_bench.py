"""`latentq bench` knows every way to decode: rows, table, picture and page. Sizes and weights are tiny here."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch

from tests.support.kl_vaes import family
from tools import decode_speed_page
from worker import bench
from worker.bench_plot import draw
from worker.bench_vaes import ARCHITECTURES, latents_of
from worker.decode_planner import DecodeMode
from worker.fast_path import FastVaes


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every mode of a tiny VAE, measured in this process; the compiler only pretends, the CPU has no bfloat16."""
    monkeypatch.setattr(bench, "random_vae", lambda *_, **__: family("one_level"))
    pretended: dict[str, Any] = {"backend": lambda graph, _: graph.forward, "instructions": lambda: None}
    monkeypatch.setattr(bench, "FastVaes", functools.partial(FastVaes, **pretended))
    given: dict[str, Any] = {"side": 64, "device": "cpu", "dtype": "float32", "repeats": 1}
    return [bench.measure_here("sd", mode=mode, **given) for mode in DecodeMode]


def test_every_mode_has_a_row_and_the_fast_ones_say_how_near_they_are(rows: list[dict[str, Any]]) -> None:
    assert [row["mode"] for row in rows] == ["plain", "fast", "compiled", "low_memory", "lean", "tiled"]
    assert [row["mode"] for row in rows if "psnr_db" in row] == ["fast", "compiled"]
    fast, compiled = rows[1:3]
    assert (fast["memory_format"], fast["fused_norms"], fast["computed_in"]) == ("channels_last", "torch", "float32")
    assert compiled["fused_norms"] == "the compiler"
    for row in (fast, compiled):
        assert row["psnr_db"] is None or row["psnr_db"] > 100  # float32 has 24 bits: some 140 dB

    lines = list(bench.table(rows))
    assert len(lines) == 1 + len(rows)
    assert all(row["mode"] in line for row, line in zip(rows, lines[1:], strict=True))
    assert draw(rows).height > draw(rows[:1]).height
    page = "\n".join(decode_speed_page._table(rows))
    assert "PSNR" in page
    assert "`compiled`" in page
    assert "PSNR" not in "\n".join(decode_speed_page._table(rows[:1]))


@pytest.mark.parametrize(("decibels", "expected"), [(None, "equal"), (61.26, "61.3")])
def test_a_picture_that_is_the_plain_one_is_called_equal(decibels: float | None, expected: str) -> None:
    assert bench.near_plain({"psnr_db": decibels}) == expected
    assert bench.near_plain({}) == ""


def test_a_cpu_is_measured_compiled_only_when_asked() -> None:
    assert "compiled" not in bench._usual_modes(torch.device("cpu"))
    assert "compiled" in bench._usual_modes(torch.device("cuda"))


@pytest.mark.filterwarnings("ignore")  # of diffusers, about configs
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_latents_of_an_architecture_become_what_was_asked_for(name: str) -> None:
    """diffusers' own decode says so, on a device without memory."""
    made = ARCHITECTURES[name]
    side, frames = 2 * made.spatial, 1 if made.temporal is None else 2 * made.temporal + 1
    with torch.device("meta"):
        vae = getattr(diffusers, made.kind)(**made.config)
        latents = latents_of(vae, name, side=side, frames=frames)
        decoded = vae.decode(latents, return_dict=False)[0]
    assert decoded.shape == (1, 3, *(() if made.temporal is None else (frames,)), side, side)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vae", "ltx", "--side", "80"], "multiple of 32"),
        (["--vae", "wan", "--frames", "8"], "must be 1, 5, 9"),
        (["--vae", "sd", "--frames", "5"], "must be 1"),
    ],
)
def test_sizes_that_no_latents_have_are_refused_before_anything_is_measured(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert said in capsys.readouterr().err
