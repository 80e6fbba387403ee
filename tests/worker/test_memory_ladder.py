"""Running out of memory costs time, not jobs: tested with an allocator that really is capped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from broker_config.errors import DecodeFailed, OutOfMemory
from tests.support.processes import ROOT
from worker.memory_ladder import How, MemoryModel, Rung, first_guess, items_that_fit, rungs
from worker.stages import classify

#: Decodes a batch with the address space capped at what plain decode lacks, and prints how it went.
_CAPPED = """
import json, os, resource, sys, threading, queue
import torch
torch.set_num_threads(1)
from diffusers import AutoencoderKL
from broker_config.vae_catalog import VaeEntry
from broker_config.messages import BlobRef, DecodeRequest, Output
from broker_config.claims import Claim
from worker.batch_decode import BatchDecoder
from worker.device_stage import DeviceStage
from worker.next_claim import NextClaim
from worker.preview import Previewer
from worker.stages import Stopwatch, Work
from worker.vae_pool import LoadedVae

items, side, headroom, width = (int(word) for word in sys.argv[1:])
torch.manual_seed(0)
vae = AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(width // 2, width, width, width), layers_per_block=1, latent_channels=4, norm_num_groups=8,
    mid_block_add_attention=False,
).eval()
entry = VaeEntry(
    name="t", title="t", weights="/t", vae_class="AutoencoderKL", channels=4, spatial=8, layouts=["unpacked"])
loaded = LoadedVae(
    entry=entry, module=vae, dtype=torch.float32, device=torch.device("cpu"), weights={}, size_bytes=0)
latents = torch.randn(items, 4, side // 8, side // 8)
with torch.inference_mode():
    vae.decode(torch.randn(1, 4, 8, 8))
    one_by_one = [vae.decode(item[None] / vae.config.scaling_factor, return_dict=False)[0] for item in latents]
    expected = torch.cat(one_by_one)
request = DecodeRequest(
    job_id="j", vae="t", layout="unpacked", latents=BlobRef(store="redis", name="n", sha256="0", size_bytes=1),
    shape=tuple(latents.shape), dtype="float32", height=side, width=side, batch=items, num_frames=1, fps=1.0,
    output=Output.TENSOR, timeout_s=60.0)
got, failures = [], []

class Reporter:
    def skip(self, claim): return False
    def fail(self, claim, failure, *, stage): failures.append(failure.error.code)

class Leases:
    def enter(self, *a, **k): pass
    def expect(self, *a, **k): pass
    def tell(self, *a): pass

def take(work, stream):
    def drain():
        for chunk in stream:
            got.append(chunk.get())
    thread = threading.Thread(target=drain); thread.start(); threads.append(thread)

threads = []
decoder = BatchDecoder(hand_on=take, on_progress=lambda *_: None, default_mode="exact")
stage = DeviceStage(queue.Queue(), next_claim=NextClaim(), decoder=decoder, reporter=Reporter(), leases=Leases(),
                    previewer=Previewer(None, None, served=tuple),
                    evict_others=lambda name: evicted.append(name) or 0, stopwatch=Stopwatch())
evicted = []
stage.memory.learn("t", dtype=torch.float32, pixels=1 << 40, used_bytes=1)  # an estimate that is far too low
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + headroom, used + headroom))
work = Work(claim=Claim("j", "e", b"", b"", 1, 0), request=request, latents=latents)
stage._bring_through(loaded, [work])
for thread in threads: thread.join()
print(json.dumps({"failures": failures, "evicted": len(evicted), "rung": str(work.decoded_by.get("rung")),
                  "equal": bool(got) and bool(torch.allclose(got[-1], expected, atol=1e-5))}))
"""


def decode_capped(*, items: int, side: int, headroom_mb: int, width: int = 64) -> dict[str, object]:
    """How a decode went whose largest activation has `width` channels of `side`², with so much address space left.

    Blocks above 1 MiB are mapped from the start, so that a decode that ran out leaves no holes in the heap.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CAPPED, *(str(number) for number in (items, side, headroom_mb << 20, width))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_batch_that_does_not_fit_is_split_until_it_does() -> None:
    # 64 channels × 512² × 4 bytes = 64 MiB an activation and picture; four pictures need some 800 MB, one some 200.
    result = decode_capped(items=4, side=512, headroom_mb=500)
    assert result == {"failures": [], "evicted": result["evicted"], "rung": Rung.SPLIT, "equal": True}
    assert result["evicted"]  # other VAEs were asked to go first


def test_what_fits_is_decoded_plain() -> None:
    result = decode_capped(items=2, side=128, headroom_mb=900)
    assert result == {"failures": [], "evicted": 0, "rung": Rung.PLAIN, "equal": True}


#: 32 channels × 1280² × 4 bytes. Large beside what else takes addresses: a thread's stack, small blocks in the heap.
_ACTIVATION_MB = 200


@pytest.mark.parametrize(("activations", "rung"), [(2.3, Rung.LOW_MEMORY), (1.35, Rung.LEAN)])
def test_a_picture_that_does_not_fit_is_decoded_with_less_memory_and_exactly(activations: float, rung: Rung) -> None:
    # plain takes some four activations, low_memory 1.4 to 1.6, lean less than one
    result = decode_capped(items=1, side=1280, headroom_mb=int(activations * _ACTIVATION_MB), width=32)
    assert result == {"failures": [], "evicted": result["evicted"], "rung": rung, "equal": True}


def test_what_fits_on_no_rung_fails_with_its_own_code() -> None:
    result = decode_capped(items=1, side=1280, headroom_mb=int(0.5 * _ACTIVATION_MB), width=32)
    assert result["failures"] == ["out_of_memory"]


@pytest.mark.parametrize(
    ("items", "first", "tiling", "expected"),
    [
        (4, 9, False, [("plain", 4), ("split", 2), ("split", 1)]),
        (5, 3, False, [("split", 3), ("split", 2), ("split", 1)]),
        (1, 1, False, [("plain", 1)]),
        (1, 1, True, [("plain", 1), ("tiled", 1)]),
    ],
)
def test_rungs_give_up_a_little_more_each_time(
    items: int, first: int, tiling: bool, expected: list[tuple[str, int]]
) -> None:
    ways = rungs(items=items, first=first, low_memory=False, tiling_allowed=tiling)
    assert [(str(how.rung), how.items_per_call) for how in ways] == expected


def test_the_low_memory_rung_comes_before_tiles() -> None:
    ways = list(rungs(items=1, first=1, low_memory=True, tiling_allowed=True))
    assert ways == [
        How(rung=Rung.PLAIN, items_per_call=1),
        How(rung=Rung.LOW_MEMORY, items_per_call=1),
        How(rung=Rung.LEAN, items_per_call=1),
        How(rung=Rung.TILED, items_per_call=1),
    ]


def test_an_estimate_gives_way_to_what_was_measured() -> None:
    model = MemoryModel()
    assert model.bytes_per_px("a", dtype=torch.float32, guess=4096.0) == 4096.0
    model.learn("a", dtype=torch.float32, pixels=1 << 20, used_bytes=5000 << 20)
    model.learn("a", dtype=torch.float32, pixels=1 << 20, used_bytes=2000 << 20)
    model.learn("a", dtype=torch.float32, pixels=64 * 64, used_bytes=64 << 20)  # a workspace, not pixels
    assert model.bytes_per_px("a", dtype=torch.float32, guess=4096.0) == 5000.0
    assert model.bytes_per_px("a", dtype=torch.float16, guess=2048.0) == 2048.0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_whoever_says_that_memory_is_short_makes_the_job_climb(error: Exception) -> None:
    assert isinstance(classify(error), OutOfMemory)


def test_an_error_that_is_not_of_memory_makes_no_job_climb() -> None:
    assert isinstance(classify(RuntimeError("CUDA error: an illegal memory access was encountered")), DecodeFailed)


def test_the_first_guess_is_the_published_prototypes_memory() -> None:
    """1,012 MB above weights for SD's VAE at 512² in float32, within a tenth."""
    vae = SimpleNamespace(config={"block_out_channels": (128, 256, 512, 512)})
    per_px = first_guess(vae, device=torch.device("cpu"), dtype=torch.float32)
    assert per_px * 512 * 512 == pytest.approx(1012e6, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "config", "measured_mib"),
    [
        # benchmarks/results/decode_modes_cpu.json: 512² × 17 frames in float32
        (diffusers.AutoencoderKLLTXVideo, {}, 761),
        # as much for each pixel of the widest activation, half of whose channels its config has first
        (diffusers.AutoencoderKLLTX2Video, {}, 761),
    ],
)
def test_channels_that_become_patches_of_pixels_are_few_for_each_pixel(
    kind: Any, config: dict[str, Any], measured_mib: int
) -> None:
    with torch.device("meta"):
        vae = kind(**config)
    per_px = first_guess(vae, device=torch.device("cpu"), dtype=torch.float32)
    assert per_px * 512 * 512 * 17 == pytest.approx(measured_mib * 2**20, rel=0.1)


def test_wan_22_makes_four_pixels_of_one() -> None:
    small = {"base_dim": 8, "decoder_base_dim": 16, "z_dim": 4, "dim_mult": [1, 2], "temperal_downsample": [True]}
    means = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    with torch.device("meta"):
        kind: Any = diffusers.AutoencoderKLWan
        plain, patched = (kind(**small, **means, patch_size=size) for size in (None, 2))
    guesses = [first_guess(vae, device=torch.device("cpu"), dtype=torch.float32) for vae in (plain, patched)]
    assert guesses[0] == 4 * guesses[1]


def test_an_item_that_needs_more_than_there_is_does_not_fit_and_one_that_just_may_is_tried() -> None:
    assert items_that_fit(bytes_per_px=4096, pixels_per_item=1 << 20, free=1) == 0
    assert items_that_fit(bytes_per_px=1000, pixels_per_item=1000, free=1_000_000) == 1
    assert items_that_fit(bytes_per_px=1000, pixels_per_item=1000, free=10_000_000) == 8


def test_what_cannot_fit_starts_with_the_low_memory_decoder_where_there_is_one() -> None:
    ways = list(rungs(items=2, first=0, low_memory=True, tiling_allowed=False))
    assert [str(how.rung) for how in ways] == ["low_memory", "lean"]
    ways = list(rungs(items=2, first=0, low_memory=False, tiling_allowed=True))
    assert [(str(how.rung), how.items_per_call) for how in ways] == [("split", 1), ("tiled", 1)]
