"""Measures one decode: seconds, and the most memory held above the weights.

On CUDA the allocator counts. On a CPU the kernel does: the peak of the resident set, reset before the decode
(`/proc/self/clear_refs`), so it is only true in a process that does nothing else; `worker.bench` starts one for each
measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worker import lowmem_decode
from worker.decode_planner import FAST_MODES, DecodeMode
from worker.fast_path import FastVae
from worker.memory_ladder import tiled


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one decode took."""

    seconds: float
    #: Most memory above what was held before; 0 where nothing counts it.
    peak_bytes: int


def decoder_of(module: Any, mode: DecodeMode, *, fast: FastVae | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from latents (B, C, …) to the VAE's sample.

    Args:
        module: the VAE.
        mode: how it is decoded.
        fast: its fast ways, for the modes that are such.
    """
    if mode in FAST_MODES:
        if fast is None:
            raise ValueError(f"{type(module).__name__} has no fast way")
        view, dtype = fast.module(compiled=mode is DecodeMode.COMPILED), fast.dtype
        return lambda z: view.decode(z.to(dtype), return_dict=False)[0]
    if mode is DecodeMode.LOW_MEMORY:
        return lambda z: lowmem_decode.decode(module, z)
    if mode is DecodeMode.LEAN:
        return lambda z: lowmem_decode.decode(module, z, lean=True)

    def own(z: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = module.decode(z, return_dict=False)[0]
        return decoded

    def in_tiles(z: torch.Tensor) -> torch.Tensor:
        with tiled(module):
            return own(z)

    return in_tiles if mode is DecodeMode.TILED else own


def measure(decode: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> Measured:
    """Runs one decode and measures it. Anything that is to be warm must have run before."""
    with torch.inference_mode():
        if z.device.type == "cuda":
            return _on_cuda(decode, z)
        before = _resident("VmRSS") if _reset_peak() else None
        started = time.perf_counter()
        decode(z)
        seconds = time.perf_counter() - started
    return Measured(seconds=seconds, peak_bytes=0 if before is None else max(0, _resident("VmHWM") - before))


def _on_cuda(decode: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> Measured:
    torch.cuda.synchronize(z.device)
    torch.cuda.reset_peak_memory_stats(z.device)
    before = torch.cuda.memory_allocated(z.device)
    started = time.perf_counter()
    decode(z)
    torch.cuda.synchronize(z.device)
    seconds = time.perf_counter() - started
    return Measured(seconds=seconds, peak_bytes=torch.cuda.max_memory_allocated(z.device) - before)


def _reset_peak() -> bool:
    """Sets the peak of the resident set to what is resident now. Returns whether the kernel let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
