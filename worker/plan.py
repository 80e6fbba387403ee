"""`python -m worker.plan`: how a VAE's decode would be run on this device. `latentq vaes NAME --plan` starts this."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from broker_config.errors import ConfigurationError, LatentqError
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from worker.decode_memory import DecodeMemory
from worker.decode_planner import CostModel, DecodeMode, DecodePlan, plan
from worker.decode_probes import fit, why_unmeasured
from worker.decode_ways import fast_options
from worker.fast_path import FastVae, FastVaes, describe, family_of, keep_compiled_in
from worker.latent_io import dtype_name
from worker.memory_ladder import first_guess, free_bytes
from worker.settings import load_worker_settings
from worker.vae_pool import LoadedVae, VaePool


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="latentq vaes", description="Shows how a decode would be run here.")
    parser.add_argument("name", help="catalogue entry")
    parser.add_argument("--size", required=True, type=_size, metavar="WIDTHxHEIGHT", help="pixels")
    parser.add_argument("--frames", type=int, default=1, help="of a clip, for VAEs of clips")
    parser.add_argument("--items", type=int, default=1, help="pictures of the job")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="overrides the catalogue's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = parser.parse_args(argv)
    if found.frames < 1 or found.items < 1:
        parser.error("--frames and --items must be 1 at least")
    return found


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})[x×]([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as in 1024x1024")
    return int(match[1]), int(match[2])


def report(
    vae: LoadedVae,
    model: CostModel,
    *,
    size: tuple[int, int],
    items: int,
    frames: int = 1,
    fast: FastVae | None = None,
    why_not_fast: str | None = None,
) -> dict[str, Any]:
    """What is printed: each mode's time and memory for the job, the choice in both modes of a job, and why."""
    pixels = size[0] * size[1] * frames
    free = free_bytes(vae.device)
    if not model.bytes:
        guess = first_guess(vae.module, device=vae.device, dtype=vae.dtype)
        sizes = {"width": size[0], "height": size[1], "num_frames": frames}
        model = model.for_item(DecodeMemory().of_item(vae, bytes_per_px=guess, **sizes), pixels=pixels)
    modes = {
        str(mode): {
            "seconds": model.seconds[mode].at(pixels),
            "peak_bytes": int(model.bytes[mode].at(pixels)) if mode in model.bytes else None,
            "items_that_fit": model.items_that_fit(mode, pixels_per_item=pixels, free_bytes=free),
        }
        for mode in DecodeMode
        if mode in model.seconds
    }
    chosen = {
        name: plan(model, items=items, pixels_per_item=pixels, free_bytes=free, exact_bits=name == "exact")
        for name in ("exact", "fast")
    }
    return {
        "vae": vae.entry.name,
        "size": f"{size[0]}x{size[1]}",
        "frames": frames,
        "items": items,
        "dtype": dtype_name(vae.dtype),
        "device": str(vae.device),
        "free_bytes": free,
        "batch_budget_px": model.budget_px(model.for_batches),
        "fast_path": describe(family_of(vae.module), fast, why_not_fast),
        "modes": modes,
        "chosen": {
            name: {"mode": str(way.mode), "items_per_call": way.items_per_call, "fits": way.fits}
            for name, way in chosen.items()
        },
        "why": {name: _why(way, model, pixels=pixels * items, exact=name == "exact") for name, way in chosen.items()},
    }


def _why(way: DecodePlan, model: CostModel, *, pixels: int, exact: bool) -> str:
    """Why the planner chose so, in a few words."""
    if not way.fits:
        return "nothing fits the free memory; this takes least of it"
    if exact and way.mode is DecodeMode.PLAIN:
        return "it fits, and gives the pipeline's bits"
    if exact:
        return "plain decode does not fit the free memory"
    plain = model.seconds[DecodeMode.PLAIN].at(pixels)
    if way.mode is DecodeMode.PLAIN:
        return "nothing that fits is faster by more than measurements differ"
    return f"the fastest that fits: {way.seconds:.3f} s, plain {plain:.3f} s"


def _fast_lines(found: dict[str, Any]) -> list[str]:
    if not found["available"]:
        return [f"fast way: none ({found['why_not']})"]
    compiled = "compiled" if found["compiled"] else f"not compiled ({found['why_not_compiled']})"
    return [
        f"fast way: {found['memory_format']}, {found['dtype']}, {found['fused_norms']} norms fused with SiLU by "
        f"{found['fused_norms_by']}, {compiled}",
        f"  known of the family: {found['evidence']}",
    ]


def as_text(found: dict[str, Any]) -> str:
    """The report for a terminal."""
    clip = f", {found['frames']} frames" if found["frames"] > 1 else ""
    lines = [
        f"{found['vae']} at {found['size']}{clip} in {found['dtype']} on {found['device']}, "
        f"{found['free_bytes'] / 1e9:.1f} GB free",
        "",
        f"{'mode':<12}{'seconds':>10}{'GB':>8}{'fit':>6}",
    ]
    for mode, row in found["modes"].items():
        memory = "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(f"{mode:<12}{row['seconds']:>10.3f}{memory:>8}{row['items_that_fit']:>6}")
    lines.append("")
    for name, way in found["chosen"].items():
        note = "" if way["fits"] else " (does not fit: the least that can be tried)"
        lines.append(f"mode {name}: {way['mode']}, {way['items_per_call']} a call{note}: {found['why'][name]}")
    lines += _fast_lines(found["fast_path"])
    lines.append(f"jobs are worth batching up to {found['batch_budget_px']} pixels a call")
    return "\n".join(lines)


def _measured(vae: LoadedVae, ways: FastVaes, fast: FastVae | None, *, size: tuple[int, int], cache: Path) -> CostModel:
    """What decodes take here; compiled ones too, where the worker would compile."""
    entry = vae.entry
    if fast is not None and fast.compiled is not None:
        keep_compiled_in(cache)
        side = (size[1] // entry.spatial, size[0] // entry.spatial)
        ways.prepare(vae.module, fast, sides=[side])
    return fit(
        vae.module,
        channels=entry.channels,
        spatial=entry.spatial,
        device=vae.device,
        dtype=vae.dtype,
        fast=fast,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a plan; returns the exit status: 0 done, 2 not possible."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        catalog = VaeCatalog.load(load_settings().catalog)
        if arguments.frames > 1 and catalog[arguments.name].temporal == 1:
            raise ConfigurationError(f"{arguments.name} is a VAE of pictures: --frames is for VAEs of clips")
        own = load_worker_settings(dtype=arguments.dtype)
        pool = VaePool(catalog, device=torch.device(arguments.device), dtype=own.dtype)
        vae = pool.get(arguments.name)
        reason = why_unmeasured(vae)
        if reason is not None:
            raise ConfigurationError(f"{arguments.name} is not measured ({reason}): plain decode begins")
        ways = FastVaes(fast_options(own))
        fast = ways.of(vae.module, half_suits=vae.half_suits)
        model = _measured(vae, ways, fast, size=arguments.size, cache=own.compile_cache)
    except LatentqError as error:
        print(f"latentq vaes: {error.message} [{error.code}]", file=sys.stderr)
        return 2
    found = report(
        vae,
        model,
        size=arguments.size,
        items=arguments.items,
        frames=arguments.frames,
        fast=fast,
        why_not_fast=ways.why_not(vae.module),
    )
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
