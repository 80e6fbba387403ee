"""Denoise and decode at the same time: wall time of a run, in process, with a thread queue, and with latentq.

Generator and worker have a core each; the broker and whatever else runs share the generator's, and their CPU is
reported. D and V are busy seconds of the overlapped run itself: of the calls of the pipeline, and of decode and encode
as the worker recorded them with each job. Encoding overlaps the next decode, so V may count seconds twice; the same
ratios are told with the CPU of the worker's process in its place, which is too little wherever the core was not its
own.

The control is the same two loads at the same time on the same cores, with no queue between: what they take of each
other (caches, memory, a core that has other work as well) is in it, and what the queue adds is not.

Bound of the wall time: the longer of the two parts, and what cannot overlap: the first prompt before anything can be
decoded, or the last picture after everything is denoised.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from benchmarks.harness import ROOT, Bench, bench, on_core, write_result

_DEMO_PIPELINE = ROOT / "producer" / "demo_pipeline"
_DEMO_VAE = ROOT / "worker" / "demo_vae"
_COUNT = 50
_BAR_WALL = 1.05
_BAR_RATIO = 0.95
#: Prompts that tell how long one takes.
_SAMPLE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A pipeline and the VAE of its latents."""

    name: str
    pipeline: Path
    vae: Path
    #: Catalogue entry.
    entry: str
    side: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How long a prompt takes to denoise, as a multiple of the decode."""

    name: str
    denoise_to_decode: float


LOADS = (Load(name="balanced", denoise_to_decode=1.0), Load(name="denoise_twice_as_long", denoise_to_decode=2.0))


def sd_shaped(folder: Path) -> Subject:
    """Stable Diffusion's UNet and VAE, narrower, with random weights: time does not depend on them."""
    torch.manual_seed(0)
    unet_class: Any = UNet2DConditionModel
    vae_class: Any = AutoencoderKL
    kind: Any = DiffusionPipeline
    pipeline = kind.from_pretrained(_DEMO_PIPELINE, vae=None, dtype=torch.float32)
    unet = unet_class(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 192, 192),
        layers_per_block=2,
        cross_attention_dim=pipeline.text_encoder.config.hidden_size,
        attention_head_dim=8,
        norm_num_groups=16,
    )
    vae = vae_class(
        block_out_channels=(48, 96, 192, 192),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=128,
    )
    vae.save_pretrained(folder / "vae")
    pipeline.register_modules(unet=unet)
    pipeline.save_pretrained(folder / "pipeline")
    return Subject(name="sd_shaped", pipeline=folder / "pipeline", vae=folder / "vae", entry="sd", side=128)


def catalog(folder: Path) -> Path:
    """A catalogue whose `sd` is the random VAE."""
    path = folder / "catalog.toml"
    path.write_text(
        f'[sd]\ntitle = "random"\nweights = "{folder / "vae"}"\nvae_class = "AutoencoderKL"\nchannels = 4\n'
        'spatial = 8\nlayouts = ["unpacked"]\n'
    )
    return path


def role(running: Bench, name: str, subject: Subject, *, steps: int, count: int, out: Path, url: str = "") -> Any:
    """The figures of one process on the generator's core."""
    process = on_core(
        running.cores.others,
        _command(name, subject, steps=steps, count=count, out=out, url=url),
        running.environment,
        stdout=subprocess.PIPE,
    )
    said, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{name} ended with status {process.returncode}")
    return json.loads(said.splitlines()[-1])


def _command(name: str, subject: Subject, *, steps: int, count: int, out: Path, url: str = "") -> list[str]:
    command = [sys.executable, "-m", "benchmarks.overlap_roles", name, "--pipeline", str(subject.pipeline)]
    command += ["--vae", str(subject.vae), "--entry", subject.entry, "--side", str(subject.side)]
    return [*command, "--steps", str(steps), "--count", str(count), "--out", str(out), "--url", url]


@contextlib.contextmanager
def endpoint(running: Bench, subject: Subject, *, out: Path) -> Iterator[str]:
    """The plain endpoint on the worker's core; its URL."""
    process = on_core(
        running.cores.worker,
        _command("endpoint", subject, steps=1, count=1, out=out),
        running.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}/"
    finally:
        process.communicate()


def control(running: Bench, subject: Subject, *, steps: int, count: int, out: Path) -> dict[str, Any]:
    """Denoising and decoding of a run at the same time, each on its core, and no queue."""
    cores = {"denoise_only": running.cores.others, "decode_only": running.cores.worker}
    processes = {
        name: on_core(
            core,
            _command(name, subject, steps=steps, count=count, out=out),
            running.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name, core in cores.items()
    }
    for process in processes.values():
        process.stdout.readline()  # it has loaded
    for process in processes.values():
        process.stdin.write(b"\n")
        process.stdin.flush()
    return {name: json.loads(process.communicate()[0].splitlines()[-1]) for name, process in processes.items()}


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far (proc(5): utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steps_for(running: Bench, subject: Subject, load: Load, *, out: Path) -> int:
    """Denoising steps with which a prompt takes that multiple of its decode."""
    found = role(running, "calibrate", subject, steps=1, count=_SAMPLE, out=out)
    steps: int = round((load.denoise_to_decode * found["decode_s"] - found["fixed_s"]) / found["step_s"])
    return max(1, steps)


def compare(running: Bench, subject: Subject, load: Load, *, count: int, folder: Path) -> dict[str, Any]:
    """The three ways and the control, in one run."""
    steps = steps_for(running, subject, load, out=folder / "sample")
    run: dict[str, Any] = {"steps": steps, "count": count}
    serial = role(running, "in_process", subject, out=folder / "a", **run)
    with endpoint(running, subject, out=folder / "b") as url:
        threaded = role(running, "thread_queue", subject, out=folder / "b", url=url, **run)
    with running.worker("--vae", subject.entry, "--threads", "1", vae=subject.entry) as worker:
        broker = int(running.client.store.connections.commands.info("server")["process_id"])
        before = cpu_s(worker.pid), cpu_s(broker)
        ours = role(running, "farm", subject, out=folder / "c", **run)
        worker_cpu_s, broker_cpu_s = cpu_s(worker.pid) - before[0], cpu_s(broker) - before[1]
    beside = control(running, subject, out=folder / "control", **run)
    return figures(serial, threaded, ours, worker_cpu_s=worker_cpu_s, broker_cpu_s=broker_cpu_s) | {
        "control_s": beside,
        "wall_to_control": ours["wall_s"] / max(part["wall_s"] for part in beside.values()),
        "steps": steps,
        "side_px": subject.side,
        "count": count,
        "different_from_in_process": different(folder / "a", folder / "c"),
        "different_from_in_process_thread_queue": different(folder / "a", folder / "b"),
    }


def figures(serial: Any, threaded: Any, ours: Any, *, worker_cpu_s: float, broker_cpu_s: float) -> dict[str, Any]:
    """Ratios of one comparison, by what was recorded and by CPU."""
    wall, denoise, recorded = ours["wall_s"], ours["denoise_s"], ours["decode_s"]
    found = {
        "in_process_s": serial,
        "thread_queue_s": threaded,
        "latentq_s": ours,
        "worker_cpu_s": worker_cpu_s,
        "broker_cpu_s": broker_cpu_s,
        "speed_up_over_in_process": serial["wall_s"] / wall,
        "speed_up_over_thread_queue": threaded["wall_s"] / wall,
        "bound_of_the_speed_up": (denoise + recorded) / max(denoise, recorded),
        "wall_to_bound_bar": _BAR_WALL,
        "overlap_ratio_bar": _BAR_RATIO,
    }
    for suffix, decode in (("", recorded), ("_by_worker_cpu", min(recorded, worker_cpu_s))):
        bound = max(denoise + ours["last_decode_s"], ours["first_denoise_s"] + decode)
        found[f"wall_to_bound{suffix}"] = wall / bound
        found[f"overlap_ratio{suffix}"] = (denoise + decode - wall) / min(denoise, decode)
    return found


def different(ours: Path, theirs: Path) -> int:
    """Pictures of one folder that the other one has not, bit for bit."""
    names = {path.name for path in ours.glob("*.png")}
    assert names == {path.name for path in theirs.glob("*.png")}
    return sum(
        not np.array_equal(np.asarray(Image.open(ours / name)), np.asarray(Image.open(theirs / name)))
        for name in sorted(names)
    )


def main(*, count: int = _COUNT) -> dict[str, Any]:
    """Runs every subject with every load, `count` prompts each, and stores the figures."""
    demo = Subject(name="demo", pipeline=_DEMO_PIPELINE, vae=_DEMO_VAE, entry="demo", side=256)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="latentq-bench-overlap-") as name:
        folder = Path(name)
        subjects = (demo, sd_shaped(folder))
        with bench(catalog(folder)) as running:
            for subject in subjects:
                for load in LOADS:
                    key = f"{subject.name}, {load.name}"
                    found[key] = compare(running, subject, load, count=count, folder=folder / subject.name / load.name)
                    print(json.dumps({key: found[key]}), file=sys.stderr)
                    write_result("overlap", found)  # at once: a run that is stopped has measured what it has
    return found


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
