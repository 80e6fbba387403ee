"""The ways a job is tried in follow from what decodes took here; a worker in mode fast takes the fast one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from broker_config.messages import BlobRef, DecodeRequest, Kind, Mode, Output
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeEntry
from producer import DecodeClient
from tests.support.clip_vaes import clip_family
from tests.support.kl_vaes import family
from tests.support.thread_worker import ThreadWorker
from worker import decode_probes, decode_ways, decode_worker, lowmem_decode
from worker.decode_memory import DecodeMemory
from worker.decode_planner import CostModel, DecodeMode, Probe
from worker.decode_probes import CostModels
from worker.decode_ways import DecodeWays, pixels_at_once
from worker.fast_path import FastOptions, FastVaes
from worker.memory_ladder import How, MemoryModel, Rung, first_guess
from worker.vae_pool import LoadedVae

GB = 10**9
CPU = torch.device("cpu")
#: Mode → microseconds and bytes for a pixel.
Costs = dict[DecodeMode, tuple[float, int]]
USUAL: Costs = {
    DecodeMode.PLAIN: (1.0, 4000),
    DecodeMode.FAST: (0.6, 4000),
    DecodeMode.COMPILED: (0.3, 4000),
    DecodeMode.LOW_MEMORY: (1.1, 1000),
    DecodeMode.LEAN: (1.4, 500),
}


def loaded(module: Any = None, **entry: Any) -> LoadedVae:
    given = {"name": "t", "title": "t", "weights": "/t", "vae_class": "AutoencoderKL", "channels": 4, "spatial": 8}
    return LoadedVae(
        entry=VaeEntry(**{**given, "layouts": ["unpacked"], **entry}),
        module=module or family("sd"),
        dtype=torch.float32,
        device=CPU,
        weights={},
        size_bytes=0,
    )


def request(*, items: int = 1, side: int = 1024, **options: Any) -> DecodeRequest:
    given = {
        "job_id": "j",
        "vae": "t",
        "layout": "unpacked",
        "latents": BlobRef(store="redis", name="n", sha256="0", size_bytes=1),
        "shape": (items, 4, side // 8, side // 8),
        "dtype": "float32",
        "height": side,
        "width": side,
        "batch": items,
        "num_frames": 1,
        "fps": 1.0,
        "output": Output.PNG,
        "timeout_s": 60.0,
        "mode": Mode.FAST,
    }
    return DecodeRequest(**{**given, **options})


def fitted(costs: Costs) -> CostModel:
    return CostModel.fit(
        [
            Probe(mode=mode, pixels=px, seconds=us * px / 1e6, peak_bytes=each * px)
            for mode, (us, each) in costs.items()
            for px in (4096, 262144)
        ]
    )


Measured = Callable[..., DecodeWays]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Ways on a device with so much free memory, where decodes took what is given."""

    def make(vae: LoadedVae, *, free: int, costs: Costs | None = None, fast: FastVaes | None = None) -> DecodeWays:
        monkeypatch.setattr(decode_ways, "free_bytes", lambda _: free)
        models = CostModels()
        if costs is not None:
            monkeypatch.setattr(decode_probes, "fit", lambda *_, **__: fitted(costs))
            models.get(vae.entry.name, vae.module, channels=4, spatial=8, device=CPU, dtype=torch.float32)
        return DecodeWays(costs=models, fast=fast or FastVaes(), memory=MemoryModel(), default_mode="exact")

    return make


def said(ways: list[How]) -> list[tuple[str, int]]:
    return [(str(how.rung), how.items_per_call) for how in ways]


@pytest.mark.parametrize(
    ("free", "items", "options", "expected"),
    [
        (100 * GB, 2, {}, [("fast", 2), ("fast", 1), ("low_memory", 1), ("lean", 1)]),
        (100 * GB, 2, {"mode": Mode.EXACT}, [("plain", 2), ("split", 1), ("low_memory", 1), ("lean", 1)]),
        (100 * GB, 1, {"mode": None}, [("plain", 1), ("low_memory", 1), ("lean", 1)]),
        (100 * GB, 1, {"allow_tiling": True}, [("fast", 1), ("low_memory", 1), ("lean", 1), ("tiled", 1)]),
        (20 * GB, 8, {}, [("fast", 4), ("fast", 2), ("fast", 1), ("low_memory", 1), ("lean", 1)]),
        (4 * GB, 1, {}, [("low_memory", 1), ("lean", 1)]),
        (4 * GB, 1, {"mode": Mode.EXACT}, [("low_memory", 1), ("lean", 1)]),
        (1 * GB, 1, {"allow_tiling": True}, [("lean", 1), ("tiled", 1)]),
    ],
)
def test_a_job_begins_with_the_planned_way_and_climbs_from_there(
    measured: Measured, free: int, items: int, options: dict[str, Any], expected: list[tuple[str, int]]
) -> None:
    vae = loaded()
    assert said(measured(vae, free=free, costs=USUAL).of_job(vae, request(items=items, **options))) == expected


def test_the_fastest_way_is_taken_whichever_it_is(measured: Measured) -> None:
    vae = loaded()
    slow_fast = {**USUAL, DecodeMode.FAST: (0.99, 4000)}  # no more than two measurements of one way differ by
    assert said(measured(vae, free=100 * GB, costs=slow_fast).of_job(vae, request()))[0] == ("plain", 1)
    quick_low = {**USUAL, DecodeMode.LOW_MEMORY: (0.5, 1000)}
    assert said(measured(vae, free=100 * GB, costs=quick_low).of_job(vae, request()))[0] == ("low_memory", 1)


def test_only_a_size_that_was_compiled_is_decoded_compiled(measured: Measured) -> None:
    vae = loaded(family("one_level"), spatial=1)
    fast = FastVaes(FastOptions(compile="on", native_bfloat16=False), backend=lambda graph, _: graph.forward)
    ways = measured(vae, free=100 * GB, costs=USUAL, fast=fast)
    small = request(items=2, side=64, shape=(2, 4, 64, 64))
    assert said(ways.of_job(vae, small))[0] == ("fast", 2)
    made = fast.of(vae.module)
    assert made is not None
    with torch.inference_mode():
        assert made.compiled is not None
        made.compiled.decoder.prepare(torch.zeros(1, 4, 64, 64))
    assert said(ways.of_job(vae, small))[:2] == [("compiled", 1), ("low_memory", 1)]
    assert said(ways.of_job(vae, request(side=72, shape=(1, 4, 72, 72))))[0] == ("fast", 1)


def test_where_nothing_was_measured_the_estimate_decides(measured: Measured) -> None:
    vae = loaded()
    assert said(measured(vae, free=100 * GB).of_job(vae, request(items=2)))[0] == ("plain", 2)
    assert said(measured(vae, free=1).of_job(vae, request()))[0] == ("low_memory", 1)


def test_where_nothing_was_measured_arithmetic_says_which_low_memory_way_fits(measured: Measured) -> None:
    vae = loaded()
    shape = (1, 4, 128, 128)
    low, lean = (lowmem_decode.working_bytes(vae.module, shape, torch.float32, lean=lean) for lean in (False, True))
    assert said(measured(vae, free=low + 1).of_job(vae, request())) == [("low_memory", 1), ("lean", 1)]
    assert said(measured(vae, free=(low + lean) // 2).of_job(vae, request())) == [("lean", 1)]
    assert said(measured(vae, free=lean // 2).of_job(vae, request()))[0] == ("low_memory", 1)  # nothing fits


#: Memory of clips is by arithmetic: only times are measured.
CLIP_COSTS: Costs = {
    DecodeMode.PLAIN: (1.0, 0),
    DecodeMode.FAST: (0.6, 0),
    DecodeMode.LOW_MEMORY: (0.8, 0),
    DecodeMode.LEAN: (1.2, 0),
}


@pytest.mark.parametrize(
    ("free", "mode", "expected"),
    [
        ("plain", "fast", "fast"),
        ("plain", "exact", "plain"),
        ("low", "fast", "low_memory"),
        ("low", "exact", "low_memory"),
        ("lean", "fast", "lean"),
        ("lean", "exact", "lean"),
    ],
)
def test_a_clip_is_planned_by_its_own_size(measured: Measured, free: str, mode: str, expected: str) -> None:
    entry = {"vae_class": "AutoencoderKLHunyuanVideo", "temporal": 4, "layouts": ["video"]}
    vae = loaded(clip_family("hunyuan_video"), **entry)
    clip = request(side=256, shape=(1, 4, 5, 32, 32), num_frames=17, layout="video", mode=Mode(mode))
    guess = first_guess(vae.module, device=CPU, dtype=torch.float32)
    found = DecodeMemory().of_item(vae, height=256, width=256, num_frames=17, bytes_per_px=guess)
    assert found[DecodeMode.LEAN] < found[DecodeMode.LOW_MEMORY] < found[DecodeMode.PLAIN]
    enough = {
        "plain": 100 * GB,
        "low": found[DecodeMode.LOW_MEMORY] / 0.84,
        "lean": (found[DecodeMode.LEAN] + found[DecodeMode.LOW_MEMORY]) // 2 / 0.85,
    }[free]
    assert enough == 100 * GB or enough * 0.85 < found[DecodeMode.PLAIN]
    ways = measured(vae, free=int(enough), costs=CLIP_COSTS)
    assert said(ways.of_job(vae, clip))[0] == (expected, 1)


def test_the_frames_of_a_clip_that_is_decoded_in_several_calls_are_counted_too(measured: Measured) -> None:
    entry = {"vae_class": "AutoencoderKLHunyuanVideo", "temporal": 4, "layouts": ["video_chunks"]}
    vae = loaded(clip_family("hunyuan_video"), **entry)
    guess = first_guess(vae.module, device=CPU, dtype=torch.float32)
    one_call = DecodeMemory().of_item(vae, height=256, width=256, num_frames=17, bytes_per_px=guess)
    rest = 3 * 256 * 256 * 17 * 4
    ways = measured(vae, free=int((one_call[DecodeMode.PLAIN] + rest / 2) / 0.85), costs=CLIP_COSTS)
    first = []
    for calls in (1, 2):
        clip = request(
            side=256,
            shape=(1, 4, 5 * calls, 32, 32),
            num_frames=17 * calls,
            layout="video_chunks",
            frames_per_call=5,
            mode=Mode.EXACT,
        )
        first.append(said(ways.of_job(vae, clip))[0])
    assert first == [("plain", 1), ("low_memory", 1)]


@pytest.mark.parametrize(
    ("options", "at_once", "expected"),
    [
        ({"num_frames": 64}, 16, "plain"),  # AnimateDiff: 16 at a time
        ({"num_frames": 64, "frames_per_call": 1}, 1, "plain"),  # I2VGen-XL
        ({"num_frames": 64, "layout": "frames_2d"}, 64, "low_memory"),  # Stable Video Diffusion: all at once
        ({"num_frames": 8}, 8, "plain"),
    ],
)
@pytest.mark.parametrize("measured_before", [True, False])
def test_a_clip_whose_frames_are_a_batch_takes_what_one_call_of_them_takes(
    measured: Measured, options: dict[str, Any], at_once: int, expected: str, measured_before: bool
) -> None:
    vae, px = loaded(), 512 * 512
    clip = request(side=512, **{"layout": "video_2d", "shape": (1, 4, 64, 64, 64), "mode": Mode.EXACT, **options})
    assert pixels_at_once(vae, clip) == at_once * px
    each = USUAL[DecodeMode.PLAIN][1] if measured_before else first_guess(vae.module, device=CPU, dtype=torch.float32)
    sixteen = 16 * px * each + 3 * 4 * px * (64 - 16)  # and the frames of the other calls are kept
    free = int(1.01 * sixteen / (0.85 if measured_before else 1))
    ways = measured(vae, free=free, costs=USUAL if measured_before else None)
    assert said(ways.of_job(vae, clip))[0] == (expected, 1)


@pytest.mark.parametrize("items", [1, 2, 3])
def test_what_was_measured_of_such_a_clip_counts_for_the_frames_of_one_call(items: int) -> None:
    clip = request(side=512, layout="video_2d", shape=(items, 4, 12, 64, 64), num_frames=12)
    assert pixels_at_once(loaded(), clip, items=items) == min(16, 12 * items) * 512 * 512


def test_a_vae_that_draws_noise_and_an_encode_stay_plain(measured: Measured) -> None:
    noisy = loaded(vae_class="ConsistencyDecoderVAE")
    assert said(measured(noisy, free=100 * GB, costs=USUAL).of_job(noisy, request(items=3))) == [("plain", 3)]
    vae = loaded()
    ways = measured(vae, free=100 * GB, costs=USUAL).of_job(vae, request(items=2, kind=Kind.ENCODE))
    assert said(ways) == [("plain", 2), ("split", 1)]


def test_a_vae_without_a_fast_way_does_not_take_it_though_it_was_measured(measured: Measured) -> None:
    vae = loaded()
    ways = measured(vae, free=100 * GB, costs=USUAL, fast=FastVaes(FastOptions(use="off")))
    assert said(ways.of_job(vae, request()))[0] == ("plain", 1)


def test_a_batch_of_jobs_shares_one_call_of_the_planned_way(measured: Measured) -> None:
    class Job:
        def __init__(self) -> None:
            self.request = request(side=64)

    vae = loaded()
    works: Any = [Job(), Job(), Job()]
    how = measured(vae, free=100 * GB, costs=USUAL).of_batch(vae, works)
    assert how == How(rung=Rung.FAST, items_per_call=3)
    assert measured(vae, free=100 * GB).of_batch(vae, works) == How(rung=Rung.PLAIN, items_per_call=3)


def test_a_batch_of_jobs_goes_in_as_many_calls_as_fit(measured: Measured) -> None:
    works: Any = [SimpleNamespace(request=request(side=1024)) for _ in range(4)]
    vae = loaded()  # plain and fast decode take 4.2 GB a picture
    split = measured(vae, free=10 * GB, costs=USUAL).of_batch(vae, works)
    assert split == How(rung=Rung.FAST, items_per_call=2)
    bytes_per_px = first_guess(vae.module, device=CPU, dtype=torch.float32)
    room = int(2.5 * bytes_per_px * 1024 * 1024)
    unmeasured = measured(vae, free=room).of_batch(vae, works)
    assert unmeasured == How(rung=Rung.SPLIT, items_per_call=2)


class UngatedWorker(ThreadWorker):
    """A gate replaces `decode` of the VAE, and such a VAE has no fast way."""

    def _hang_gate(self, vae: Any) -> None:
        return None


@pytest.mark.parametrize("use", ["auto", "off"])
def test_a_worker_in_mode_fast_decodes_the_fast_way_and_says_so(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    # measured times differ from machine to machine
    monkeypatch.setattr(decode_probes, "fit", lambda *_, **__: fitted(USUAL))
    monkeypatch.setattr(decode_worker, "keep_compiled_in", lambda folder: None)
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    exact, fast, other = (
        client.submit(latents, vae="sd", output="tensor", mode=mode, provenance=False)
        for mode in ("exact", "fast", "fast")
    )
    with UngatedWorker(settings, mode="fast", max_batch_px=None, fast_path=use, dtype="float32"):
        assert len(list(client.as_completed([exact, fast, other], timeout=60))) == 3
    assert exact.result().decoded_by["rung"] == "plain"
    assert "fast_path" not in exact.result().decoded_by
    for job in (fast, other):
        facts = job.result().decoded_by
        assert (facts["mode"], facts["dtype"]) == ("fast", "float32")
        assert facts["rung"] == ("fast" if use == "auto" else "plain")
        if use == "auto":
            assert facts["fast_path"] == {"memory_format": "channels_last", "fused_norms": "torch", "compiled": False}
        assert float(np.abs(exact.array() - job.array()).max()) <= 1e-4


def test_small_decodes_share_an_answer_to_what_is_free(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    vae, clock = loaded(), [100.0]
    asked: list[torch.device] = []

    def free_bytes(device: torch.device) -> int:
        asked.append(device)
        return 100 * GB

    ways = measured(vae, free=100 * GB, costs=USUAL)
    monkeypatch.setattr(decode_ways, "free_bytes", free_bytes)
    monkeypatch.setattr(decode_ways, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for _ in range(3):
        ways.of_job(vae, request())
        clock[0] += 0.02
    assert len(asked) == 1
    clock[0] += 0.02
    ways.of_job(vae, request())
    assert len(asked) == 2
