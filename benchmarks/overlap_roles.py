"""The processes of `overlap`: in-process, diffusers' thread queue, the farm, and a plain endpoint that decodes.

Each prints one line of JSON and stores its pictures as PNG files named by their seeds. They share the pipeline, its
calls, the encoder and the number of threads, so that what differs is who waits for whom.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import queue
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from producer import DecodeClient
from producer.prompt_farm import Farm
from producer.prompt_farm.denoiser import Denoiser, quiet_libraries
from worker.image_encoding import encode_image


def load(folder: str) -> Any:
    """The pipeline without its VAE."""
    kind: Any = DiffusionPipeline
    quiet_libraries()
    pipeline = kind.from_pretrained(folder, vae=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_vae(folder: str) -> Any:
    """The VAE that decodes."""
    kind: Any = AutoencoderKL
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(count: int) -> list[dict[str, Any]]:
    """Rows with seeds of their own."""
    subjects = ("a cup of coffee on a wooden table", "a rocket on its launch pad at dusk", "a tabby cat, close up")
    return [{"prompt": subjects[number % len(subjects)], "seed": number} for number in range(count)]


def denoise(pipeline: Any, row: dict[str, Any], *, steps: int, side: int, output_type: str) -> Any:
    """One call, as the farm makes it."""
    with torch.inference_mode():
        return pipeline(
            prompt=row["prompt"],
            generator=torch.Generator("cpu").manual_seed(row["seed"]),
            num_inference_steps=steps,
            height=side,
            width=side,
            output_type=output_type,
            return_dict=False,
        )[0]


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """The bytes of a picture (H, W, 3)."""
    return encode_image(pixels, output="png", metadata={}, provenance=None).data


def in_process(asked: argparse.Namespace) -> dict[str, Any]:
    """One after the other: denoise, decode, encode, store, next."""
    pipeline = load(asked.pipeline)
    whole = copy.copy(pipeline)
    whole.vae = load_vae(asked.vae)
    rows = prompts(asked.count)
    warm = {"prompt": "warm", "seed": 0}
    denoise(whole, warm, steps=asked.steps, side=asked.side, output_type="pil")
    spent = {"denoise": 0.0, "decode": 0.0}
    began = time.perf_counter()
    for row in rows:
        started = time.perf_counter()
        latents = denoise(pipeline, row, steps=asked.steps, side=asked.side, output_type="latent")
        denoised = time.perf_counter()
        pixels = decode(whole, latents)
        (asked.out / f"{row['seed']}.png").write_bytes(png(pixels))
        spent["denoise"] += denoised - started
        spent["decode"] += time.perf_counter() - denoised
    return {"wall_s": time.perf_counter() - began, **{f"{name}_s": value for name, value in spent.items()}}


def decode(pipeline: Any, latents: torch.Tensor) -> np.ndarray[Any, Any]:
    """The end of StableDiffusionPipeline.__call__ (diffusers pipeline_stable_diffusion.py)."""
    with torch.inference_mode():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        picture = pipeline.image_processor.postprocess(decoded, output_type="pil", do_denormalize=[True])[0]
    return np.asarray(picture)


def thread_queue(asked: argparse.Namespace) -> dict[str, Any]:
    """diffusers' documented pattern (hybrid inference, "Queuing"): a daemon thread posts latents one by one."""
    pipeline = load(asked.pipeline)
    rows = prompts(asked.count)
    denoise(pipeline, {"prompt": "warm", "seed": 0}, steps=asked.steps, side=asked.side, output_type="latent")
    line: queue.Queue[tuple[int, torch.Tensor] | None] = queue.Queue()

    def work() -> None:
        while (item := line.get()) is not None:
            seed, latents = item
            shape = ",".join(str(size) for size in latents.shape)
            request = urllib.request.Request(asked.url, data=latents.numpy().tobytes(), headers={"X-Shape": shape})
            with urllib.request.urlopen(request, timeout=120) as answer:
                (asked.out / f"{seed}.png").write_bytes(answer.read())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    spent = 0.0
    began = time.perf_counter()
    for row in rows:
        started = time.perf_counter()
        latents = denoise(pipeline, row, steps=asked.steps, side=asked.side, output_type="latent")
        spent += time.perf_counter() - started
        line.put((row["seed"], latents))
    line.put(None)
    thread.join()
    return {"wall_s": time.perf_counter() - began, "denoise_s": spent}


def endpoint(asked: argparse.Namespace) -> dict[str, Any]:
    """A plain synchronous endpoint: decodes what is posted, answers with a PNG. Says its port, ends with its input."""
    pipeline = load(asked.pipeline)
    pipeline.vae = load_vae(asked.vae)
    busy = 0.0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_POST(self) -> None:
            nonlocal busy
            data = bytearray(self.rfile.read(int(self.headers["Content-Length"])))
            started = time.perf_counter()
            shape = [int(size) for size in self.headers["X-Shape"].split(",")]
            body = png(decode(pipeline, torch.frombuffer(data, dtype=torch.float32).reshape(shape)))
            busy += time.perf_counter() - started
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    side = asked.side // 8
    decode(pipeline, torch.zeros(1, pipeline.vae.config.latent_channels, side, side))
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(json.dumps({"port": server.server_address[1]}), flush=True)
        sys.stdin.read()
        server.shutdown()
    return {"decode_s": busy}


def farm(asked: argparse.Namespace) -> dict[str, Any]:
    """latentq: `Farm` in this process, the worker elsewhere."""
    pipeline = load(asked.pipeline)
    denoise(pipeline, {"prompt": "warm", "seed": 0}, steps=asked.steps, side=asked.side, output_type="latent")
    with DecodeClient.from_env() as client:
        run = Farm(
            pipeline,
            client,
            prompts(asked.count),
            out=asked.out,
            vae=asked.entry,
            mode="exact",
            name_template="{seed}",
            defaults={"steps": asked.steps, "height": asked.side, "width": asked.side},
        )
        denoising = _denoise_cpu()
        cpu = time.process_time()
        results = list(run)
        cpu = time.process_time() - cpu - sum(denoising)
    overlap = run.tally.overlap
    assert overlap is not None
    assert all(result.error is None for result in results)
    first = min(results, key=lambda result: result.task.seed)
    last = max(results, key=lambda result: result.task.seed)
    return {
        "wall_s": overlap.wall_s,
        "denoise_s": overlap.denoise_s,
        "decode_s": overlap.decode_s,
        "first_denoise_s": first.timings_s["denoise"],
        "last_decode_s": (last.timings_s["decode"] or 0.0) + (last.timings_s["encode"] or 0.0),
        "denoise_cpu_s": sum(denoising),
        "other_cpu_s": cpu,
    }


def _denoise_cpu() -> list[float]:
    """From now on, the CPU seconds of each call of the pipeline."""
    spent: list[float] = []
    usual = Denoiser.latents_of

    def timed(self: Denoiser, tasks: Any) -> Any:
        began = time.thread_time()
        try:
            return usual(self, tasks)
        finally:
            spent.append(time.thread_time() - began)

    Denoiser.latents_of = timed  # type: ignore[method-assign]
    return spent


def denoise_only(asked: argparse.Namespace) -> dict[str, Any]:
    """The denoising of a run and nothing else, beside `decode_only` on the other core."""
    pipeline = load(asked.pipeline)
    rows = prompts(asked.count)
    run = functools.partial(denoise, pipeline, steps=asked.steps, side=asked.side, output_type="latent")
    run({"prompt": "warm", "seed": 0})
    return _timed(lambda: [run(row) for row in rows])


def decode_only(asked: argparse.Namespace) -> dict[str, Any]:
    """The decoding and encoding of a run and nothing else, beside `denoise_only` on the other core."""
    pipeline = load(asked.pipeline)
    latents = denoise(pipeline, prompts(1)[0], steps=asked.steps, side=asked.side, output_type="latent")
    pipeline.vae = load_vae(asked.vae)
    png(decode(pipeline, latents))
    return _timed(lambda: [png(decode(pipeline, latents)) for _ in range(asked.count)])


def _timed(work: Callable[[], object]) -> dict[str, Any]:
    """Wall time and CPU of `work`, which begins when a line comes in."""
    print("ready", flush=True)
    sys.stdin.readline()
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def calibrate(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a decode, of a step, and of what a call costs besides."""
    whole = load(asked.pipeline)
    whole.vae = load_vae(asked.vae)
    rows = prompts(asked.count)
    seconds = dict.fromkeys((2, 6), 0.0)
    denoise(whole, rows[0], steps=2, side=asked.side, output_type="pil")
    decoding = 0.0
    for row in rows:
        for steps in seconds:
            began = time.perf_counter()
            latents = denoise(whole, row, steps=steps, side=asked.side, output_type="latent")
            seconds[steps] += (time.perf_counter() - began) / len(rows)
        began = time.perf_counter()
        png(decode(whole, latents))
        decoding += (time.perf_counter() - began) / len(rows)
    step = (seconds[6] - seconds[2]) / 4
    return {"decode_s": decoding, "step_s": step, "fixed_s": seconds[2] - 2 * step}


ROLES = {
    "calibrate": calibrate,
    "denoise_only": denoise_only,
    "decode_only": decode_only,
    "in_process": in_process,
    "thread_queue": thread_queue,
    "endpoint": endpoint,
    "farm": farm,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Plays the role that the arguments name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap_roles")
    parser.add_argument("role", choices=sorted(ROLES))
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--vae", required=True)
    parser.add_argument("--entry", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--url", default="")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(ROLES[asked.role](asked)), flush=True)


if __name__ == "__main__":
    main()
