"""Jobs/s through the queue ÷ a bare loop of decode then encode on the same VAE, core and thread count."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from benchmarks.harness import ROOT, Bench, bench, on_core, waiting_share, write_result

_DEMO = ROOT / "worker" / "demo_vae"


def full_size_sd(folder: Path) -> Path:
    """SD's VAE at full size with random weights: time does not depend on them."""
    torch.manual_seed(0)
    autoencoder: Any = AutoencoderKL
    vae = autoencoder(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    vae.save_pretrained(folder / "sd")
    catalog = folder / "catalog.toml"
    catalog.write_text(
        f'[sd]\ntitle = "random"\nweights = "{folder / "sd"}"\nvae_class = "AutoencoderKL"\nchannels = 4\n'
        'spatial = 8\nlayouts = ["unpacked"]\n'
    )
    return catalog


def bare(running: Bench, *, weights: Path, channels: int, side: int, jobs: int) -> float:
    """Jobs/s of the bare loop."""
    command = [sys.executable, "-m", "benchmarks.bare_loop", "--weights", str(weights), "--channels", str(channels)]
    command += ["--side", str(side), "--jobs", str(jobs)]
    process = on_core(running.cores.worker, command, running.environment, stdout=subprocess.PIPE)
    out, _ = process.communicate()
    result = json.loads(out.splitlines()[-1])
    return float(result["jobs"] / result["seconds"])


def queued(running: Bench, *, vae: str, channels: int, side: int, jobs: int) -> tuple[float, float]:
    """Jobs/s of a backlog through the queue, between the first and the last end; and the device's share of waiting."""
    client = running.client
    latents = np.random.default_rng(0).standard_normal((1, channels, side // 8, side // 8)).astype(np.float32)
    done = running.worker_report(jobs=0).jobs
    handles = [client.submit(latents, vae=vae, output="png", provenance=False) for _ in range(jobs + 1)]
    before = running.worker_report(jobs=done + 1)  # the wait for the first job is not the queue's fault
    list(client.as_completed(handles))
    after = running.worker_report(jobs=done + jobs + 1)
    ends = sorted(snapshot.ended_ms for snapshot in client.store.snapshots([job.id for job in handles]))
    return jobs / ((ends[-1] - ends[0]) / 1000), waiting_share(before, after)


def compare(
    running: Bench, *, vae: str, weights: Path, channels: int, side: int, jobs: int, rounds: int
) -> dict[str, Any]:
    """Rounds of bare loop and queue in turn, on the same core; the worker is stopped while the loop runs."""
    loops, queues, waits = [], [], []
    with running.worker("--vae", vae, "--threads", "1", vae=vae) as worker:
        queued(running, vae=vae, channels=channels, side=side, jobs=2)

        def loop_alone() -> None:
            worker.send_signal(signal.SIGSTOP)
            try:
                loops.append(bare(running, weights=weights, channels=channels, side=side, jobs=jobs))
            finally:
                worker.send_signal(signal.SIGCONT)
            time.sleep(1.0)  # leases of nothing: the worker renews and beats again

        def through_the_queue() -> None:
            through, waited = queued(running, vae=vae, channels=channels, side=side, jobs=jobs)
            queues.append(through)
            waits.append(waited)

        for number in range(rounds):  # each first in turn: a core's speed drifts
            for measure in (loop_alone, through_the_queue)[:: -1 if number % 2 else 1]:
                measure()
    ratios = [through / loop for through, loop in zip(queues, loops, strict=True)]
    return {
        "side_px": side,
        "jobs": jobs,
        "bare_jobs_per_s": loops,
        "queue_jobs_per_s": queues,
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "bar": 0.95,
        "device_waiting_shares": waits,
        "device_waiting_median": statistics.median(waits),
        "device_waiting_bar": 0.03,
    }


def main(*, rounds: int = 3) -> dict[str, Any]:
    """Runs both VAEs and stores the figures."""
    with tempfile.TemporaryDirectory(prefix="latentq-bench-sd-") as folder:
        catalog = full_size_sd(Path(folder))
        channels = json.loads((_DEMO / "config.json").read_text())["latent_channels"]
        with bench(catalog) as running:
            figures = {
                "demo": compare(
                    running, vae="demo", weights=_DEMO, channels=channels, side=256, jobs=30, rounds=rounds
                ),
                "sd_full_size": compare(
                    running, vae="sd", weights=Path(folder) / "sd", channels=4, side=256, jobs=5, rounds=rounds
                ),
            }
    write_result("throughput", figures)
    return figures


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
