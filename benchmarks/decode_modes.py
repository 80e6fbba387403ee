"""Time and memory of the ways to decode: `python -m benchmarks.decode_modes`. Every family that decodes in low memory.

Each figure is of a process of its own, as `latentq bench` measures it. Modes of a case take turns, the fastest of its
rounds counts, and figures are stored one case at a time, each with the machine and commit it is of.
docs/decode-speed.md is written from them (`python -m tools.decode_speed_page`). On a CPU sizes are such that a decode
takes some minutes at most. A mode that fails is named and left out, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.harness import RESULTS
from worker.bench import measure_apart, surroundings, table
from worker.bench_vaes import ARCHITECTURES
from worker.decode_planner import DecodeMode

_LOW: Final = (DecodeMode.PLAIN, DecodeMode.LOW_MEMORY, DecodeMode.LEAN)
#: Norms are per pixel: both low-memory modes are one.
_LOW_ONE: Final = (DecodeMode.PLAIN, DecodeMode.LOW_MEMORY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A VAE at a size."""

    vae: str
    side: int
    dtype: str
    modes: Sequence[DecodeMode]
    frames: int = 1
    #: How often each mode is measured.
    rounds: int = 1


CASES: Final[Mapping[str, Sequence[Case]]] = {
    "cpu": (
        Case(vae="sd", side=512, dtype="float32", modes=(*_LOW, DecodeMode.TILED, DecodeMode.FAST), rounds=2),
        Case(vae="qwen-image", side=512, dtype="float32", modes=(*_LOW_ONE, DecodeMode.TILED), rounds=3),
        Case(vae="wan", side=256, frames=9, dtype="float32", modes=_LOW_ONE, rounds=2),
        Case(vae="ltx", side=512, frames=17, dtype="float32", modes=_LOW_ONE, rounds=2),
        Case(vae="hunyuan-video-1.5", side=256, frames=9, dtype="float32", modes=_LOW_ONE),
        Case(vae="hunyuan-video", side=256, frames=9, dtype="float32", modes=_LOW),
        Case(vae="cogvideox", side=256, frames=9, dtype="float32", modes=_LOW),
        Case(vae="mochi", side=256, frames=25, dtype="float32", modes=_LOW),
    ),
    "cuda": (
        Case(vae="sd", side=1024, dtype="float16", modes=tuple(DecodeMode)),
        Case(vae="sdxl", side=1024, dtype="float16", modes=tuple(DecodeMode)),
        Case(vae="flux", side=2048, dtype="bfloat16", modes=tuple(DecodeMode)),
        Case(vae="qwen-image", side=1024, dtype="bfloat16", modes=(*_LOW_ONE, DecodeMode.TILED)),
        Case(vae="wan", side=640, frames=81, dtype="bfloat16", modes=_LOW_ONE),
        Case(vae="ltx", side=768, frames=121, dtype="bfloat16", modes=_LOW_ONE),
        Case(vae="hunyuan-video-1.5", side=640, frames=81, dtype="bfloat16", modes=_LOW_ONE),
        Case(vae="hunyuan-video", side=640, frames=81, dtype="bfloat16", modes=_LOW),
        Case(vae="cogvideox", side=480, frames=49, dtype="bfloat16", modes=_LOW),
        Case(vae="mochi", side=480, frames=85, dtype="bfloat16", modes=_LOW),
    ),
}


def measured(case: Case, *, device: torch.device, failed: list[str]) -> Iterator[dict[str, Any]]:
    """A figure for each mode that did not fail: the fastest of its rounds."""
    common = {"vae": case.vae, "side": case.side, "frames": case.frames, "dtype": case.dtype, "device": str(device)}
    repeats = 3 if device.type == "cuda" else 1
    best: dict[DecodeMode, dict[str, Any]] = {}
    for number in range(case.rounds):
        for mode in case.modes[:: -1 if number % 2 else 1]:
            row = measure_apart(common | {"mode": str(mode), "repeats": repeats}, threads=None)
            if "error" in row:
                failed.append(f"{case.vae} {mode}: {row['error']}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            if mode not in best or row["seconds"] < best[mode]["seconds"]:
                best[mode] = row
    yield from (best[mode] for mode in case.modes if mode in best)


def main(device: torch.device, vaes: Sequence[str], folder: Path) -> list[str]:
    """Measures every case of these VAEs, and stores the figures beside those of the others. Returns what failed."""
    path, failed = folder / f"decode_modes_{device.type}.json", list[str]()
    around = surroundings(device)
    kept = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else []
    rows = [row for row in kept if row["vae"] not in vaes]
    order = [case.vae for case in CASES[device.type]]
    for case in CASES[device.type]:
        if case.vae not in vaes:
            continue
        rows += [row | {"on": around} for row in measured(case, device=device, failed=failed)]
        rows.sort(key=lambda row: order.index(row["vae"]))
        path.write_text(json.dumps({"figures": rows}, indent=2) + "\n", encoding="utf-8")
        print("\n".join(table(rows)), flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", action="append", choices=list(ARCHITECTURES), help="repeatable; without it, all")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the figures")
    arguments = parser.parse_args()
    sys.exit(1 if main(torch.device(arguments.device), arguments.vae or list(ARCHITECTURES), arguments.into) else 0)
