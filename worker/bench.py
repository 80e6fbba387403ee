"""`python -m worker.bench`: time and memory of decodes on this device, mode by mode. `latentq bench` starts this.

Weights are random: neither time nor memory depends on them. Each figure comes from a process of its own, which decodes
a small latent to be warm, then the latent that counts, and reports the fastest of its repeats.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from worker import lowmem_decode
from worker.bench_plot import draw
from worker.bench_vaes import ARCHITECTURES, cut_tiles, latents_of, random_vae
from worker.decode_meter import decoder_of, measure
from worker.decode_planner import FAST_MODES, DecodeMode
from worker.fast_path import FastOptions, FastVae, FastVaes

#: Longest one measurement may take.
_TIMEOUT_S: Final = 1800
#: What has the same figures but for the mode.
SAME: Final = ("vae", "side", "frames", "dtype")


def measure_here(
    name: str, *, side: int, mode: DecodeMode, device: str, dtype: str, repeats: int, frames: int = 1
) -> dict[str, Any]:
    """One figure, measured in this process."""
    where, kind = torch.device(device), getattr(torch, dtype)
    vae = random_vae(name, device=where, dtype=kind)
    if mode is DecodeMode.TILED:
        cut_tiles(vae, side)
    fast = _fast_vae(vae, side=side, mode=mode) if mode in FAST_MODES else None
    decode = decoder_of(vae, mode, fast=fast)
    latents = latents_of(vae, name, side=side, frames=frames).to(where, kind)
    measure(decode, latents[:, :, :2, :8, :8] if latents.ndim == 5 else latents[..., :16, :16])
    took = [measure(decode, latents) for _ in range(repeats)]
    largest = lowmem_decode.largest_bytes(vae, latents.shape, kind)
    peak = took[0].peak_bytes  # of the first: what one leaves in the caches is no memory of the next
    return {
        "vae": name,
        "side": side,
        "frames": frames,
        "mode": str(mode),
        "dtype": dtype,
        "seconds": round(min(each.seconds for each in took), 4),
        "peak_bytes": peak,
        "largest_activation_bytes": largest,
        **({} if fast is None else _beside_plain(vae, decode, latents, fast=fast, mode=mode)),
    }


def _fast_vae(vae: Any, *, side: int, mode: DecodeMode) -> FastVae:
    """The VAE's fast ways; compiled for this size, whatever is known of the family, if that is the mode.

    Raises:
        RuntimeError: the compiler gave up.
    """
    made = FastVaes(FastOptions(compile="on" if mode is DecodeMode.COMPILED else "off"))
    fast = made.of(vae)
    if fast is None:
        raise RuntimeError(f"no fast way: {made.why_not(vae)}")
    if mode is DecodeMode.COMPILED:
        made.prepare(vae, fast, sides=[(side // 8, side // 8)], others=False)
        if not fast.compiles(side // 8, side // 8):
            raise RuntimeError("could not be compiled; the log says why")
    return fast


def _beside_plain(
    vae: Any, decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, *, fast: FastVae, mode: DecodeMode
) -> dict[str, Any]:
    """How a fast way decodes, and how near to plain decode here: PSNR, over the range of the plain picture."""
    with torch.inference_mode():
        plain = vae.decode(latents, return_dict=False)[0].double()
        error = (decode(latents).double() - plain).square().mean()
    if not torch.isfinite(error):
        raise RuntimeError(f"{mode} or plain decode made NaN or Inf")
    decibels = float(10 * torch.log10((plain.max() - plain.min()).square() / error)) if error > 0 else None
    facts = fast.facts(compiled=mode is DecodeMode.COMPILED)
    return {
        "computed_in": str(fast.dtype).removeprefix("torch."),
        "memory_format": facts["memory_format"],
        "fused_norms": facts["fused_norms"],
        "psnr_db": None if decibels is None else round(decibels, 1),
    }


def measure_apart(settings: Mapping[str, Any], *, threads: int | None) -> dict[str, Any]:
    """One figure, measured in a process of its own; `error` instead of figures if that failed."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "worker.bench", "--one", json.dumps(settings)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {**settings, "error": f"took more than {_TIMEOUT_S} s"}
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
        return {**settings, "error": reason[:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def surroundings(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit."""
    total: int | None = None
    if device.type == "cuda":
        name, total = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    else:
        name = _processor()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "device": name,
        "device_type": device.type,
        "memory_bytes": total,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "diffusers")},
        "commit": commit.stdout.strip() or None,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The figures for a terminal, each beside plain decode's of the same VAE, size and dtype."""
    figures = f"{'seconds':>9}{'× plain':>9}{'MiB':>8}{'× largest':>11}{'dB':>7}"
    yield f"{'vae':<18}{'side':>6}{'frames':>8}  {'dtype':<10}{'mode':<12}{figures}"
    for row in rows:
        start = f"{row['vae']:<18}{row['side']:>6}{row['frames']:>8}  {row['dtype']:<10}{row['mode']:<12}"
        if "error" in row:
            yield f"{start}  {row['error']}"
            continue
        plain = next(
            (r for r in rows if r["mode"] == "plain" and "error" not in r and all(r[k] == row[k] for k in SAME)), None
        )
        ratio = f"{row['seconds'] / plain['seconds']:.2f}" if plain else "?"
        memory = row["peak_bytes"] / row["largest_activation_bytes"]
        near = near_plain(row)
        yield f"{start}{row['seconds']:>9.3f}{ratio:>9}{row['peak_bytes'] / 2**20:>8.0f}{memory:>11.2f}{near:>7}"


def near_plain(row: Mapping[str, Any]) -> str:
    """PSNR of a fast way against plain decode, in dB; `equal`: bit for bit. Empty for the other modes."""
    if "psnr_db" not in row:
        return ""
    return "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"


def _usual_modes(device: torch.device) -> list[str]:
    """Modes measured unless some are named: on a CPU, compiled decode is used only where it is forced."""
    return [str(mode) for mode in DecodeMode if device.type == "cuda" or mode is not DecodeMode.COMPILED]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="latentq bench", description="Time and memory of decodes on this device.")
    parser.add_argument("--vae", action="append", choices=list(ARCHITECTURES), help="repeatable; default: sd, sdxl")
    parser.add_argument("--side", action="append", type=int, help="pixels of a side; repeatable; default: 512, 1024")
    parser.add_argument("--frames", type=int, default=1, help="of a clip, for VAEs of clips; default: 1")
    parser.add_argument("--mode", action="append", choices=[str(mode) for mode in DecodeMode], help="repeatable")
    parser.add_argument("--dtype", action="append", choices=["float32", "float16", "bfloat16"], help="repeatable")
    parser.add_argument("--device", default="cuda:0" if cuda else "cpu")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU")
    parser.add_argument("--repeats", type=int, default=5 if cuda else 1, help="decodes of each figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write figures and surroundings")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    found = parser.parse_args(argv)
    vaes = [ARCHITECTURES[name] for name in found.vae or ("sd", "sdxl")]
    for side in found.side or ():
        for vae in vaes:
            if side < 64 or side % vae.spatial:
                parser.error(f"--side must be a multiple of {vae.spatial}, from 64 up")
    for vae in vaes:
        if found.frames != 1 and (vae.temporal is None or found.frames < 1 or (found.frames - 1) % vae.temporal):
            counts = "1" if vae.temporal is None else f"1, {vae.temporal + 1}, {2 * vae.temporal + 1} …"
            parser.error(f"--frames of {vae.kind} must be {counts}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status: 0 done, 1 if any figure is missing."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    if arguments.one is not None:
        settings = dict(arguments.one)
        print(json.dumps(measure_here(settings.pop("vae"), **settings | {"mode": DecodeMode(settings["mode"])})))
        return 0
    device = torch.device(arguments.device)
    around = surroundings(device)
    if arguments.threads is not None:
        around["threads"] = arguments.threads
    rows: list[dict[str, Any]] = []
    for vae in arguments.vae or ("sd", "sdxl"):
        for dtype in arguments.dtype or ("float16" if device.type == "cuda" else "float32",):
            for side in arguments.side or (512, 1024):
                for mode in arguments.mode or _usual_modes(device):
                    settings = {
                        "vae": vae,
                        "side": side,
                        "frames": arguments.frames,
                        "mode": mode,
                        "dtype": dtype,
                        "device": arguments.device,
                    }
                    row = measure_apart(settings | {"repeats": arguments.repeats}, threads=arguments.threads)
                    rows.append(row)
                    print(f"measured {vae} {side} {dtype} {mode}", file=sys.stderr, flush=True)
                    if arguments.json is not None:  # at once: a run that is stopped has measured what it has
                        text = json.dumps({"figures": rows, **around}, indent=2)
                        arguments.json.write_text(text + "\n", encoding="utf-8")
    print("\n".join(table(rows)))
    if arguments.plot is not None:
        draw(rows).save(arguments.plot)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
