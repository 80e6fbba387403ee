"""The memory of a clip's decode is what arithmetic on shapes says, measured as the peak of a process's resident set.

Each decode runs in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLMochi

from tests.support.clip_vaes import cogvideox, hunyuan_video, mochi
from tests.support.processes import ROOT
from worker import lowmem_decode
from worker.lowmem_decode import decode_plan
from worker.lowmem_decode.decode_plan import plan_decode
from worker.lowmem_decode.structure import read

#: VAEs, and latents. The largest activation has 32 channels in float32: 58 MiB of 13 frames of 192², 216 MiB of Mochi's
#: 48 frames, 49 MiB of 8 frames of 224².
_MADE: Mapping[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "hunyuan_video": (lambda: hunyuan_video(block_out_channels=(16, 32, 32, 32)), (1, 4, 4, 24, 24)),
    "mochi": (lambda: mochi(decoder_block_out_channels=(32, 32, 32, 32)), (1, 4, 8, 24, 24)),
    "cogvideox": (lambda: cogvideox(block_out_channels=(16, 32, 32, 32)), (1, 4, 2, 28, 28)),
}

_MEASURED = """
import json, sys, torch
from tests.lowmem_decode.test_clip_memory import _MADE
from worker.decode_meter import decoder_of, measure
from worker.decode_planner import DecodeMode
torch.set_num_threads(1)
make, shape = _MADE[sys.argv[1]]
vae = make().eval()
del vae.encoder
decode = decoder_of(vae, DecodeMode(sys.argv[2]))
with torch.inference_mode():
    decode(torch.randn(1, 4, 1, 4, 4))
print(json.dumps(measure(decode, torch.randn(shape)).peak_bytes))
"""


@functools.cache
def peak(name: str, mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, name, mode],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: int = json.loads(done.stdout.splitlines()[-1])
    if found == 0:
        pytest.skip("the kernel does not let a process reset its peak")
    return found


#: The estimate includes the clip itself: three channels for the 32 of the largest activation.
@pytest.mark.parametrize(
    ("name", "mode", "activations"),
    [
        ("hunyuan_video", "low_memory", 1.7),
        ("hunyuan_video", "lean", 0.95),
        ("mochi", "low_memory", 0.5),
        ("cogvideox", "lean", 1.1),
    ],
)
def test_the_estimate_is_about_the_activations(name: str, mode: str, activations: float) -> None:
    make, shape = _MADE[name]
    estimate = lowmem_decode.working_bytes(make(), shape, torch.float32, lean=mode == "lean")
    assert estimate <= activations * lowmem_decode.largest_bytes(make(), shape, torch.float32)


def test_the_estimate_is_what_was_measured() -> None:
    make, shape = _MADE["hunyuan_video"]
    estimate = lowmem_decode.working_bytes(make(), shape, torch.float32)
    # what else a process takes: code that oneDNN generates and its buffers, holes in the heap; 17 MiB were measured
    assert 0.7 * estimate <= peak("hunyuan_video", "low_memory") <= estimate + (32 << 20)


def full_size(kind: Any, **config: Any) -> Any:
    with torch.device("meta"):
        vae = kind(**config)
    del vae.encoder
    return vae.to_empty(device="cpu").to(torch.bfloat16)  # `meta` weights are refused


_COGVIDEOX = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (128, 256, 256, 512),
}


@pytest.mark.parametrize(
    ("kind", "config", "shape", "largest", "limits"),
    [
        # 129 frames of 720p, in tiles of 17 whose last upsample has 256 channels
        (AutoencoderKLHunyuanVideo, {}, (1, 16, 33, 90, 160), 17 * 720 * 1280 * 256, (1.6, 1.0)),
        # 168 frames of 480p, 128 channels; a latent frame at a time
        (AutoencoderKLMochi, {}, (1, 12, 28, 60, 106), 168 * 480 * 848 * 128, (0.3, 0.3)),
        # 49 frames of 480p, in groups of which the first has 9; what convolutions remember is 2 activations more
        (AutoencoderKLCogVideoX, _COGVIDEOX, (1, 16, 13, 60, 90), 9 * 480 * 720 * 256, (3.6, 3.0)),
    ],
)
def test_the_real_ones_by_arithmetic(
    kind: Any, config: dict[str, Any], shape: tuple[int, ...], largest: int, limits: tuple[float, float]
) -> None:
    """Of the largest activation that diffusers' own decode makes; above the weights and without the clip."""
    vae = full_size(kind, **config)
    assert lowmem_decode.largest_bytes(vae, shape, torch.bfloat16) == 2 * largest
    clip = 3 * 2 * shape[3] * shape[4] * 64 * {33: 129, 28: 163, 13: 49}[shape[2]]
    for lean, limit in zip((False, True), limits, strict=True):
        held = lowmem_decode.working_bytes(vae, shape, torch.bfloat16, lean=lean) - clip
        assert held <= limit * 2 * largest


@pytest.mark.parametrize(
    ("kind", "config", "shape"),
    [
        (AutoencoderKLCogVideoX, _COGVIDEOX, (1, 16, 13, 60, 90)),
        (AutoencoderKLMochi, {}, (1, 12, 5, 32, 32)),
    ],
)
def test_on_cuda_a_lean_decode_remembers_in_host_memory(
    kind: Any, config: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_plan, "free_bytes", lambda device: 8 << 30)
    vae = full_size(kind, **config)
    program = replace(read(vae), device=torch.device("cuda"))
    largest = lowmem_decode.largest_bytes(vae, shape, torch.bfloat16)
    plan = plan_decode(vae, program, shape, lean=True)
    assert plan.caches_on_host
    assert plan.cache_bytes == 0
    assert plan.peak_bytes <= largest
    assert not plan_decode(vae, program, shape, lean=False).caches_on_host
    assert not plan_decode(vae, read(vae), shape, lean=True).caches_on_host
    monkeypatch.setattr(decode_plan, "free_bytes", lambda device: 1 << 20)  # a host that is short of memory itself
    assert not plan_decode(vae, program, shape, lean=True).caches_on_host


@pytest.mark.parametrize("lean", [False, True])
def test_a_stream_takes_no_more_than_the_decode_as_a_whole(lean: bool) -> None:
    """A latent frame at a time, Mochi's convolutions remember more than a short clip has; a long one goes so."""
    vae = full_size(AutoencoderKLMochi)
    program = read(vae)
    pieces = []
    for frames in (1, 2, 3, 4, 6, 8, 28):
        shape = (1, 12, frames, 60, 106)
        whole, streamed = (plan_decode(vae, program, shape, lean=lean, streaming=way) for way in (False, True))
        assert streamed.peak_bytes <= whole.peak_bytes
        pieces.append(len(streamed.spans))
    assert pieces[:3] == [1, 1, 1]
    assert pieces[-1] == 28
