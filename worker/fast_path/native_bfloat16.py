"""Whether a CPU multiplies in bfloat16 itself: then its decodes take half the memory traffic and less time.

Elsewhere oneDNN converts to float32 and back, which is slower than float32 (AVX2: no instruction for it at all).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

import torch

#: What the kernel calls the instructions: matrix tiles and dot products of x86, and those of ARMv8.6.
_INSTRUCTIONS: Final = ("amx_bf16", "avx512_bf16", "bf16")
_CPUINFO: Final = Path("/proc/cpuinfo")


@functools.cache
def native_bfloat16(cpuinfo: Path = _CPUINFO) -> str | None:
    """The instructions with which this CPU multiplies bfloat16; None: it has none, or does not say.

    Args:
        cpuinfo: what the kernel says of the CPU.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    line = next((line for line in lines if line.split(":")[0].strip() in ("flags", "Features")), "")
    flags = set(line.partition(":")[2].split())
    return next((name for name in _INSTRUCTIONS if name in flags), None)


def fast_dtype(loaded: torch.dtype, *, device: torch.device, half_suits: bool, instructions: str | None) -> torch.dtype:
    """The dtype of a fast decode's weights.

    Args:
        loaded: of the VAE as it was loaded.
        device: where it decodes.
        half_suits: whether the family may be decoded in half precision, and nobody asked for another dtype.
        instructions: what `native_bfloat16` found.
    """
    if device.type == "cpu" and loaded == torch.float32 and half_suits and instructions is not None:
        return torch.bfloat16
    return loaded
