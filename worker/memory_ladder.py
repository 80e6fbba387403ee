"""How a decode gets by with the memory there is: an estimate before it, and rungs to climb when it was wrong.

The estimate is bytes of working memory for each decoded pixel, for each VAE and dtype: at first a published figure,
then the largest that was measured here. It decides how many items one call of the VAE takes. When a decode runs out
of memory all the same, the next rung is tried, each giving up a little more:

    fast         mode fast: other memory format, norms fused (`worker.fast_path`); compiled: the same, compiled
    plain        every item in one call, as the pipeline does
    split        fewer items a call, down to one (what `enable_slicing` does; last bits may differ from plain)
    low_memory   the low-memory decoder, where there is one for the VAE: exact, in 1.6 times its largest activation
    lean         the same, computing the largest activations again instead of storing them
    tiled        diffusers' tiling: not exact, only where the job allows it

Where decodes were measured (`worker.decode_planner`), the first rung is the one planned; the same ones follow.
Before the first other rung the cache is emptied and every other VAE is evicted. The rung is recorded in the result.
"""

from __future__ import annotations

import gc
import os
import resource
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import torch

from broker_config import cgroup_memory

#: Working memory ÷ the largest full-resolution activation. CPU: 1,012 MB ÷ 268 MB for SD's VAE at 512² in float32.
#: CUDA: 2200 elements a pixel (reserved; InvokeAI vae_working_memory.py) ÷ its 256 channels: cuDNN takes workspaces.
_ACTIVATIONS_CPU: Final = 4.0
_ACTIVATIONS_CUDA: Final = 8.6
#: Class → the same, on a CPU and on CUDA, of those that hold more. CPU: benchmarks/results/decode_modes_cpu.json,
#: rounded up; Wan as for one frame. CUDA: 2900 elements a pixel (InvokeAI vae_working_memory.py) ÷ 192 channels for
#: Wan and Qwen-Image; for the others, which nobody measured, as much more than on a CPU as those.
_ACTIVATIONS_OF: Final[Mapping[str, tuple[float, float]]] = {
    "AutoencoderKLQwenImage": (11.5, 15.1),
    "AutoencoderKLWan": (11.5, 15.1),
    "AutoencoderKLHunyuanVideo": (6.0, 7.9),
    "AutoencoderKLCogVideoX": (7.6, 10.0),
    # Of channels that are twice and four times those of the widest activation: 5.3 and 7 of that.
    "AutoencoderKLLTXVideo": (2.8, 3.7),
    "AutoencoderKLLTX2Video": (1.4, 1.9),
}
#: Classes whose last channels become patches of `patch_size` squared pixels.
_IN_PATCHES: Final = frozenset({"AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video"})
#: Channels at full resolution when a config does not tell: those of the widest family, AutoencoderKL.
_CHANNELS_UNKNOWN: Final = 256
#: Part of the free memory a plan may use: fragmentation and what other threads take meanwhile.
_USABLE: Final = 0.85
#: The smallest call whose memory says something of larger ones: 512².
_TELLING_PX: Final = 512 * 512


class Rung(StrEnum):
    """One way to decode."""

    PLAIN = "plain"
    FAST = "fast"
    COMPILED = "compiled"
    SPLIT = "split"
    LOW_MEMORY = "low_memory"
    LEAN = "lean"
    TILED = "tiled"


#: Rungs of mode fast alone.
FAST_RUNGS: Final = frozenset({Rung.FAST, Rung.COMPILED})


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """How a decode is to be run."""

    rung: Rung
    #: Items (pictures, or clips of a video VAE) in one call of the VAE.
    items_per_call: int


def rungs(*, items: int, first: int, low_memory: bool, tiling_allowed: bool, best: Rung = Rung.PLAIN) -> Iterator[How]:
    """Ways to decode `items`, the best first.

    Args:
        items: pictures or clips of the job.
        first: items one call takes to begin with, by the estimate. 0: not even one fits, so the low-memory decoder is
            first if there is one; a host that is short of memory kills the process instead of saying so.
        low_memory: whether there is a low-memory decoder for the VAE.
        tiling_allowed: whether the job allows a decode that is not exact.
        best: the rung to begin with: plain, fast or compiled, or one further down that was planned.
    """
    planned_low = low_memory and best in (Rung.LOW_MEMORY, Rung.LEAN)
    if not planned_low and (first > 0 or not low_memory):
        whole, part = (best, best) if best in FAST_RUNGS else (Rung.PLAIN, Rung.SPLIT)
        per_call = max(1, min(first, items))
        yield How(rung=whole if per_call == items else part, items_per_call=per_call)
        while per_call > 1:
            per_call = (per_call + 1) // 2
            yield How(rung=part, items_per_call=per_call)
    if low_memory:
        if best is not Rung.LEAN:
            yield How(rung=Rung.LOW_MEMORY, items_per_call=1)
        yield How(rung=Rung.LEAN, items_per_call=1)
    if tiling_allowed:
        yield How(rung=Rung.TILED, items_per_call=1)


def first_guess(module: Any, *, device: torch.device, dtype: torch.dtype) -> float:
    """Working bytes for each decoded pixel that is an activation, for a VAE never measured here.

    Args:
        module: the VAE. The last up block of AutoencoderKL takes `block_out_channels[1]` channels at full resolution
            (autoencoders/vae.py `Decoder.__init__`), that of Wan twice its `base_dim` (autoencoder_kl_wan.py
            `WanDecoder3d`). Where the last channels become patches of pixels, that is at the patches' resolution.
        device: where it decodes.
        dtype: of its weights.
    """
    config = module.config
    widths = list(config.get("block_out_channels") or ())
    base = config.get("decoder_base_dim") or config.get("base_dim")
    channels = max(widths[:2]) if widths else 2 * base if base else _CHANNELS_UNKNOWN
    if type(module).__name__ in _IN_PATCHES:
        channels /= int(config.get("patch_size") or 1) ** 2
    usual = (_ACTIVATIONS_CPU, _ACTIVATIONS_CUDA)
    on_cpu, on_cuda = _ACTIVATIONS_OF.get(type(module).__name__, usual)
    return float((on_cuda if device.type == "cuda" else on_cpu) * channels * dtype.itemsize)


class MemoryModel:
    """Working memory of decodes, by VAE and dtype. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._measured: dict[tuple[str, torch.dtype], float] = {}

    def bytes_per_px(self, vae: str, *, dtype: torch.dtype, guess: float) -> float:
        """Working bytes for each decoded pixel: the largest measured, else `guess`."""
        with self._lock:
            return self._measured.get((vae, dtype), guess)

    def learn(self, vae: str, *, dtype: torch.dtype, pixels: int, used_bytes: int) -> None:
        """Takes in what one call used; the largest ratio seen counts.

        A small call says nothing of a large one: its workspaces are as large, for a fraction of the pixels.
        """
        if pixels < _TELLING_PX or used_bytes < 1:
            return
        with self._lock:
            seen = self._measured.get((vae, dtype), 0.0)
            self._measured[vae, dtype] = max(seen, used_bytes / pixels)


def items_that_fit(*, bytes_per_px: float, pixels_per_item: int, free: int) -> int:
    """Items one call may take with `free` bytes; 0 only if one takes more than there is, not just more than is wise."""
    item_bytes = max(1.0, bytes_per_px * pixels_per_item)
    return max(1 if item_bytes <= free else 0, int(free * _USABLE / item_bytes))


def free_bytes(device: torch.device) -> int:
    """Memory a decode may still take on `device`: what the driver has free and torch has cached, or the host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        with open("/proc/self/statm", encoding="ascii") as sizes:
            used = int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        free = min(free, max(0, limit - used))
    in_group = cgroup_memory.free_bytes()
    return free if in_group is None else min(free, in_group)


class Meter:
    """`with Meter(device) as m: …` then `m.used_bytes`: the most a block held above what was held before it.

    Only CUDA counts its allocations; on a CPU nothing is measured and the first guess stays.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.used_bytes = 0

    def __enter__(self) -> Meter:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.used_bytes = torch.cuda.max_memory_allocated(self._device) - self._before


def synchronize(device: torch.device) -> None:
    """Waits until `device` has done what it was told.

    Raises:
        RuntimeError: the device is lost to this process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_room(device: torch.device, *, evict: Callable[[], int]) -> int:
    """Frees what can be freed without a decode losing anything. Returns how many VAEs were evicted.

    Call it after the error's handler was left: a traceback keeps the tensors of its frames alive.
    """
    evicted = evict()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return evicted


class tiled:
    """Switches diffusers' tiling on for a block, and back to what it was."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._before = bool(getattr(vae, "use_tiling", False))

    def __enter__(self) -> None:
        self._vae.enable_tiling()

    def __exit__(self, *_: object) -> None:
        if not self._before:
            self._vae.disable_tiling()
