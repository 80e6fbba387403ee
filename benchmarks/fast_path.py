"""How much faster the fast ways decode than diffusers: `python -m benchmarks.fast_path`.

Random weights of the full architectures: neither time nor memory depends on them. Every round decodes once in each way,
so a ratio compares decodes that ran next to each other; figures are medians over the rounds. Results go to
benchmarks/results/fast_path_<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import diffusers
import torch

from benchmarks.harness import write_result
from worker import lowmem_decode
from worker.bench import surroundings
from worker.bench_vaes import random_vae
from worker.decode_meter import Measured, decoder_of, measure
from worker.decode_planner import FAST_MODES, DecodeMode
from worker.fast_path import FastOptions, FastVae, FastVaes

#: Decodes in each way that nothing is taken of: kernels are chosen, workspaces made.
_WARM: Final = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One VAE at one size."""

    vae: str
    dtype: torch.dtype
    #: Latents: (1, C, h, w) or (1, C, f, h, w).
    shape: tuple[int, ...]
    #: Most milliseconds, or least ratio of plain to the best way, that are aimed at.
    bar: str = ""


#: 1024² and, of Wan, 832 × 480 × 81 frames.
CASES: Final[Mapping[str, Case]] = {
    "flux 1024² bf16": Case(vae="flux", dtype=torch.bfloat16, shape=(1, 16, 128, 128), bar="≤ 25 ms"),
    "flux 2048² bf16": Case(vae="flux", dtype=torch.bfloat16, shape=(1, 16, 256, 256)),
    "sdxl 1024² fp16": Case(vae="sdxl", dtype=torch.float16, shape=(1, 4, 128, 128)),
    "wan 480p × 81 bf16": Case(vae="wan", dtype=torch.bfloat16, shape=(1, 16, 21, 60, 104), bar="plain ÷ fast ≥ 1.5"),
}
#: On a CPU: what two cores do in minutes.
CPU_CASES: Final[Mapping[str, Case]] = {
    "sd 256² fp32": Case(vae="sd", dtype=torch.float32, shape=(1, 4, 32, 32), bar="plain ÷ fast ≥ 1.8 with native bf16")
}


def make(case: Case, device: torch.device) -> Any:
    """The VAE of a case, with random weights."""
    if case.vae != "wan":
        return random_vae(case.vae, device=device, dtype=case.dtype)
    torch.manual_seed(0)
    autoencoder: Any = diffusers.AutoencoderKLWan  # its defaults are those of Wan 2.1
    return autoencoder().eval().to(device=device, dtype=case.dtype)


def run(case: Case, *, device: torch.device, rounds: int, compile_it: bool) -> dict[str, Any]:
    """Figures of a case by way."""
    vae = make(case, device)
    ways = FastVaes(FastOptions(compile="auto" if compile_it else "off"))
    fast = ways.of(vae)
    if fast is not None and fast.compiled is not None:
        ways.prepare(vae, fast, sides=[(case.shape[2], case.shape[3])])
    z = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)
    decodes = {mode: decoder_of(vae, mode, fast=fast) for mode in _modes(vae, fast)}
    took: dict[DecodeMode, list[Measured]] = {mode: [] for mode in decodes}
    for _ in range(_WARM if device.type == "cuda" else 0):
        for decode in decodes.values():
            measure(decode, z)
    for _ in range(rounds):
        for mode, decode in decodes.items():
            took[mode].append(measure(decode, z))
    return {
        str(mode): {
            "seconds_median": statistics.median(each.seconds for each in found),
            "plain_ratio_median": statistics.median(
                plain.seconds / each.seconds for plain, each in zip(took[DecodeMode.PLAIN], found, strict=True)
            ),
            "peak_bytes": max(each.peak_bytes for each in found),
            "psnr_db": _psnr(decodes[DecodeMode.PLAIN], decodes[mode], z) if mode is not DecodeMode.PLAIN else None,
            **(fast.facts(compiled=mode is DecodeMode.COMPILED) if fast is not None and mode in FAST_MODES else {}),
        }
        for mode, found in took.items()
    }


def _modes(vae: Any, fast: FastVae | None) -> list[DecodeMode]:
    modes = [DecodeMode.PLAIN]
    if fast is not None:
        modes += [DecodeMode.FAST, *([DecodeMode.COMPILED] if fast.is_compiled else [])]
    if lowmem_decode.supports(vae) is None:
        modes += [DecodeMode.LOW_MEMORY, DecodeMode.LEAN]
    return modes


def _psnr(
    plain: Callable[[torch.Tensor], torch.Tensor], other: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor
) -> float | None:
    """Over the range of the plain decode; None: bit for bit equal."""
    with torch.inference_mode():
        expected = plain(z).float()
        error = (other(z).float() - expected).square().mean()
    return float(10 * torch.log10((expected.max() - expected.min()).square() / error)) if error > 0 else None


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fast_path", description=__doc__)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="default: 20 on CUDA, 3 on a CPU")
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-store", action="store_true", help="print only")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    rounds = arguments.rounds or (20 if device.type == "cuda" else 3)
    figures: dict[str, Any] = {}
    for name, case in (CASES if device.type == "cuda" else CPU_CASES).items():
        if arguments.only is not None and arguments.only not in name:
            continue
        figures[name] = run(case, device=device, rounds=rounds, compile_it=not arguments.no_compile)
        for mode, row in figures[name].items():
            near = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
            milliseconds = row["seconds_median"] * 1000
            print(
                f"{name:<22}{mode:<12}{milliseconds:>10.1f} ms  plain ÷ it {row['plain_ratio_median']:.2f}"
                f"  {row['peak_bytes'] / 2**20:>7.0f} MiB  {near}  {case.bar}",
                flush=True,
            )
    if not arguments.no_store:
        print(write_result(f"fast_path_{device.type}", {"cases": figures, "rounds": rounds, **surroundings(device)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
