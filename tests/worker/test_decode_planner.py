"""What is planned follows from what was measured: made-up measurements, expectations by arithmetic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.vae_catalog import VaeEntry
from tests.support.kl_vaes import family
from tests.support.pixel_norm_vaes import pixel_norm_family
from tests.support.processes import ROOT
from worker import lowmem_decode
from worker.decode_planner import CostModel, DecodeMode, Line, Probe, plan
from worker.decode_probes import CostModels, fit
from worker.plan import as_text, report
from worker.vae_pool import LoadedVae

GB = 10**9


def probes(mode: DecodeMode, *, constant_s: float, s_per_px: float, bytes_per_px: int) -> list[Probe]:
    return [
        Probe(mode=mode, pixels=px, seconds=constant_s + s_per_px * px, peak_bytes=1_000_000 + bytes_per_px * px)
        for px in (4096, 16384, 65536, 262144)
    ]


def model() -> CostModel:
    """Plain takes 10 ms and 1 µs a pixel in 4 kB; low-memory twice the time in 1 kB; lean three times in 0.5 kB."""
    return CostModel.fit(
        probes(DecodeMode.PLAIN, constant_s=0.01, s_per_px=1e-6, bytes_per_px=4000)
        + probes(DecodeMode.LOW_MEMORY, constant_s=0.02, s_per_px=2e-6, bytes_per_px=1000)
        + probes(DecodeMode.LEAN, constant_s=0.03, s_per_px=3e-6, bytes_per_px=500)
    )


def test_the_lines_the_measurements_lie_on_are_found() -> None:
    found = model()
    assert found.seconds[DecodeMode.PLAIN].constant == pytest.approx(0.01)
    assert found.seconds[DecodeMode.PLAIN].slope == pytest.approx(1e-6)
    assert found.bytes[DecodeMode.LEAN].constant == pytest.approx(1_000_000)
    assert found.bytes[DecodeMode.LEAN].slope == pytest.approx(500)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(1e-6, 1e6)), min_size=1, max_size=8))
def test_a_line_never_promises_less_than_nothing(points: list[tuple[float, float]]) -> None:
    line = Line.fit(points)
    assert line.constant >= 0
    assert line.slope >= 0
    assert line.at(0) >= 0


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(100.0, 5.0)], Line(constant=0.0, slope=0.05)),
        ([(100.0, 5.0), (200.0, 5.0)], Line(constant=5.0, slope=0.0)),
        ([(100.0, 1.0), (200.0, 3.0)], None),
    ],
)
def test_few_or_odd_points(points: list[tuple[float, float]], expected: Line | None) -> None:
    line = Line.fit(points)
    if expected is None:  # a line through both would cost less than nothing at 0
        assert line.constant == 0
    else:
        assert line.constant == pytest.approx(expected.constant)
        assert line.slope == pytest.approx(expected.slope)


def test_a_batch_grows_until_the_constant_is_a_twentieth() -> None:
    budget = model().budget_px()
    assert budget == pytest.approx(
        0.01 / (0.05 * 1e-6), rel=1e-4
    )  # 200,000 pixels: three pictures of 256², none of 512²
    line = model().seconds[DecodeMode.PLAIN]
    assert line.at(budget) / budget == pytest.approx(1.05 * line.slope)


def test_a_device_without_a_constant_batches_nothing() -> None:
    found = CostModel.fit(probes(DecodeMode.PLAIN, constant_s=0.0, s_per_px=1e-6, bytes_per_px=1))
    assert found.budget_px() < 4096


@pytest.mark.parametrize(
    ("items", "free", "exact", "mode", "per_call"),
    [
        (2, 100 * GB, True, DecodeMode.PLAIN, 2),
        (8, 20 * GB, True, DecodeMode.PLAIN, 4),  # (0.85 · 20 GB − 1 MB) / (4 kB · 1 Mpx) = 4.05
        (1, 4 * GB, True, DecodeMode.LOW_MEMORY, 1),
        (1, 1 * GB, True, DecodeMode.LEAN, 1),
        (1, 4 * GB, False, DecodeMode.LOW_MEMORY, 1),
    ],
)
def test_the_fastest_way_that_fits_is_taken(
    items: int, free: int, exact: bool, mode: DecodeMode, per_call: int
) -> None:
    found = plan(model(), items=items, pixels_per_item=1024 * 1024, free_bytes=free, exact_bits=exact)
    assert (found.mode, found.items_per_call, found.fits) == (mode, per_call, True)
    assert found.peak_bytes <= 0.85 * free


def test_seconds_of_a_plan_are_those_of_its_calls() -> None:
    found = plan(model(), items=9, pixels_per_item=1024 * 1024, free_bytes=20 * GB, exact_bits=True)
    assert found.items_per_call == 4  # 4 + 4 + 1: three constants, nine pictures
    assert found.seconds == pytest.approx(3 * 0.01 + 9 * 1024 * 1024 * 1e-6)


def test_where_every_bit_counts_plain_is_taken_though_another_is_faster() -> None:
    faster = CostModel.fit(
        probes(DecodeMode.PLAIN, constant_s=0.01, s_per_px=1e-6, bytes_per_px=4000)
        + probes(DecodeMode.LOW_MEMORY, constant_s=0.01, s_per_px=8e-7, bytes_per_px=1000)
    )
    for exact, mode in ((True, DecodeMode.PLAIN), (False, DecodeMode.LOW_MEMORY)):
        found = plan(faster, items=1, pixels_per_item=262144, free_bytes=9 * GB, exact_bits=exact)
        assert found.mode is mode


@pytest.mark.parametrize("tiling", [False, True])
def test_tiles_are_the_last_resort_and_only_if_allowed(tiling: bool) -> None:
    found = CostModel.fit(
        probes(DecodeMode.PLAIN, constant_s=0.01, s_per_px=1e-6, bytes_per_px=4000)
        + probes(DecodeMode.TILED, constant_s=0.01, s_per_px=2e-6, bytes_per_px=10)
    )
    small = plan(found, items=1, pixels_per_item=1024 * 1024, free_bytes=GB, exact_bits=False, tiling_allowed=tiling)
    assert (small.mode, small.fits) == ((DecodeMode.TILED, True) if tiling else (DecodeMode.PLAIN, False))
    large = plan(
        found, items=1, pixels_per_item=1024 * 1024, free_bytes=9 * GB, exact_bits=False, tiling_allowed=tiling
    )
    assert large.mode is DecodeMode.PLAIN


def test_what_fits_nowhere_is_tried_in_the_mode_that_takes_least() -> None:
    found = plan(model(), items=1, pixels_per_item=1024 * 1024, free_bytes=1000, exact_bits=True)
    assert (found.mode, found.fits) == (DecodeMode.LEAN, False)


def test_a_model_survives_being_stored() -> None:
    assert CostModel.from_wire(json.loads(json.dumps(model().to_wire()))) == model()


def test_a_fit_to_real_decodes_tells_time_and_memory(tmp_path: Path) -> None:
    vae = family("sd")
    cpu = torch.device("cpu")
    found = fit(vae, channels=4, spatial=8, device=cpu, dtype=torch.float32)
    assert set(found.seconds) == {DecodeMode.PLAIN, DecodeMode.LOW_MEMORY, DecodeMode.LEAN}
    for line in found.seconds.values():
        assert line.at(512 * 512) > line.at(64 * 64) > 0
    for mode, below in ((DecodeMode.LOW_MEMORY, 1.8), (DecodeMode.LEAN, 1.1)):
        largest = 32 * 1024 * 1024 * 4  # the last upsample's channels at 1024²
        assert found.bytes[mode].at(1024 * 1024) <= below * largest
    models = CostModels(tmp_path / "models.json")
    first = models.get("sd", vae, channels=4, spatial=8, device=cpu, dtype=torch.float32)
    again = CostModels(tmp_path / "models.json").get("sd", None, channels=4, spatial=8, device=cpu, dtype=torch.float32)
    assert again == first  # read, not fitted: there is no VAE to fit


def wan_vae() -> LoadedVae:
    given: Any = {"name": "wan", "title": "t", "weights": "/t", "vae_class": "AutoencoderKLWan", "layouts": ["video"]}
    return LoadedVae(
        entry=VaeEntry(**given, channels=4, spatial=8, temporal=4),
        module=pixel_norm_family("wan"),
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights={},
        size_bytes=0,
    )


def test_a_fit_to_real_decodes_of_clips_tells_time_and_each_size_its_memory() -> None:
    vae = wan_vae()
    found = fit(vae.module, channels=4, spatial=8, device=vae.device, dtype=torch.float32)
    assert set(found.seconds) == {DecodeMode.PLAIN, DecodeMode.LOW_MEMORY, DecodeMode.LEAN}
    for line in found.seconds.values():
        assert line.at(9 * 256 * 256) > line.at(64 * 64) > 0
    assert not found.bytes
    plan_of = report(vae, found, size=(256, 192), items=1, frames=9)
    assert (plan_of["size"], plan_of["frames"]) == ("256x192", 9)
    assert plan_of["chosen"]["exact"] == {"mode": "plain", "items_per_call": 1, "fits": True}
    shape = (1, 4, 3, 24, 32)  # (9 - 1) / 4 + 1 latent frames of 192 / 8 rows and 256 / 8 columns
    low = lowmem_decode.working_bytes(vae.module, shape, torch.float32)
    assert abs(plan_of["modes"]["low_memory"]["peak_bytes"] - low) <= 1
    assert "wan at 256x192, 9 frames" in as_text(plan_of)


def latentq(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "latentq"), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_the_command_shows_a_plan_of_the_demo_vae() -> None:
    done = latentq("vaes", "demo", "--plan", "512x256", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"] == "512x256"
    assert found["chosen"]["exact"] == {"mode": "plain", "items_per_call": 1, "fits": True}
    assert set(found["modes"]) == {"plain", "fast", "low_memory", "lean"}
    assert found["why"]["exact"] == "it fits, and gives the pipeline's bits"
    fast = found["fast_path"]
    assert (fast["memory_format"], fast["dtype"], fast["fused_norms_by"]) == ("channels_last", "float32", "torch")
    assert fast["fused_norms"] > 0
    assert (fast["compiled"], fast["why_not_compiled"]) == (False, "compiled on CUDA only, unless forced")
    assert found["modes"]["lean"]["peak_bytes"] < found["modes"]["low_memory"]["peak_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plan", "512x512"), "NAME"),
        (("demo", "--plan", "big"), "WIDTHxHEIGHT"),
        (("nope", "--plan", "8x8"), "nope"),
        (("demo", "--plan", "512x512", "--frames", "9"), "is a VAE of pictures"),
    ],
)
def test_a_plan_of_nothing_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = latentq("vaes", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
