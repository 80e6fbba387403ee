"""What the queue itself costs: no-op decodes/s, latency, claims in a long queue, memory for each job."""

from __future__ import annotations

import json
import queue
import statistics
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import redis
from rq import Queue
from rq.serializers import JSONSerializer
from safetensors.numpy import save

from benchmarks.harness import Bench, bench, on_core, percentile, python_loop_ms, write_result
from broker_config.blob_store import RedisBlobStore
from broker_config.messages import BlobRef, DecodeRequest, Mode, Output
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient

_LATENTS = np.zeros((1, 4, 8, 8), dtype=np.float32)


def noop_client(running: Bench) -> DecodeClient:
    """A client that knows the VAE `noop`."""
    from benchmarks.noop_worker import ENTRY

    return DecodeClient(
        running.client.store.connections,
        settings=running.settings,
        catalog=VaeCatalog({**VaeCatalog.load(), "noop": ENTRY}),
    )


def ours_per_s(running: Bench, *, mode: str, jobs: int) -> float:
    """No-op decodes/s of a backlog."""
    client = noop_client(running)
    with running.worker(mode, module="benchmarks.noop_worker", vae="noop") as worker:
        client.submit(_LATENTS, vae="noop", output="uint8").wait(30)
        worker.send_signal(19)  # SIGSTOP: the backlog is there before the first job starts
        handles = [client.submit(_LATENTS, vae="noop", output="uint8", provenance=False) for _ in range(jobs)]
        worker.send_signal(18)  # SIGCONT
        for _ in client.as_completed(handles[-8:], timeout=300):
            pass
        ends = sorted(item.ended_ms for item in client.store.snapshots([job.id for job in handles]))
    return (jobs - 1) / ((ends[-1] - ends[0]) / 1000)


def stock_per_s(running: Bench, *, jobs: int) -> float:
    """Jobs/s of a stock SimpleWorker that reads and writes the same blobs."""
    connection = redis.Redis.from_url(running.environment["LATENTQ_REDIS_URL"])
    line = Queue("stock", connection=connection, serializer=JSONSerializer)
    done = []
    for number in range(jobs):
        connection.set(f"stock:{number}", _LATENTS.tobytes(), ex=3600)
        done.append(line.enqueue("benchmarks.stock_worker.decode", f"stock:{number}", result_ttl=3600))
    process = on_core(running.cores.worker, [sys.executable, "-m", "benchmarks.stock_worker"], running.environment)
    process.wait(300)
    ends = sorted(job.ended_at for job in done if job.refresh() is None and job.ended_at)
    assert len(ends) == jobs
    return float((jobs - 1) / (ends[-1] - ends[0]).total_seconds())


def sync_http_per_s(*, jobs: int) -> float:
    """Jobs/s of a plain synchronous endpoint that does nothing, driven by one thread that works off a queue.

    This is the pattern of diffusers' documentation (hybrid inference, "Queuing"): a daemon thread takes latents from
    a `queue.Queue` and posts each to the endpoint.
    """

    class Endpoint(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = bytes(64 * 64 * 3)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    line: queue.Queue[bytes | None] = queue.Queue()

    def work() -> None:
        while (item := line.get()) is not None:
            urllib.request.urlopen(urllib.request.Request(url, data=item), timeout=30).read()

    for _ in range(jobs):
        line.put(_LATENTS.tobytes())
    line.put(None)
    started = time.perf_counter()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    seconds = time.perf_counter() - started
    server.shutdown()
    return jobs / seconds


def latency(running: Bench, *, samples: int) -> dict[str, Any]:
    """Submit to result in hand on an idle queue, minus decode and encode, in ms."""
    client = noop_client(running)
    speed_ms = [python_loop_ms()]
    overheads = []
    with running.worker("exact", module="benchmarks.noop_worker", vae="noop"):
        for number in range(samples + 20):
            started = time.perf_counter()
            job = client.submit(_LATENTS, vae="noop", output="uint8", provenance=False)
            job.wait(30)
            artifacts = job.artifacts()
            elapsed = time.perf_counter() - started
            assert artifacts
            times = job.result().timings_s
            if number >= 20:
                overheads.append((elapsed - times["decode"] - times["encode"]) * 1000)
    speed_ms.append(python_loop_ms())
    return {
        "python_loop_ms": speed_ms,
        "samples": len(overheads),
        "p50_ms": statistics.median(overheads),
        "p99_ms": percentile(overheads, 0.99),
        "bar_p50_ms": 8.0,
        "bar_p99_ms": 30.0,
    }


def _request(name: str, latents: BlobRef, *, vae: str) -> DecodeRequest:
    return DecodeRequest(
        job_id=name,
        vae=vae,
        layout="unpacked",
        latents=latents,
        shape=(1, 4, 8, 8),
        dtype="float32",
        height=64,
        width=64,
        batch=1,
        num_frames=1,
        fps=16.0,
        output=Output.PNG,
        mode=Mode.FAST,
    )


def claim_cost(running: Bench, *, few: int, many: int, claims: int) -> dict[str, Any]:
    """Time of one claim with `few` and with `many` jobs queued, in turn; claimed jobs are handed back."""
    store = running.client.store
    blobs = RedisBlobStore(store.connections, provisional_s=running.settings.provisional_s)
    latents = save({"latents": _LATENTS})
    queued = {"few": few, "many": many}
    for vae, count in queued.items():
        for number in range(count):
            name = f"{vae}-{number}"
            store.submit(_request(name, blobs.put(name, latents), vae=vae))
    times: dict[str, list[float]] = {vae: [] for vae in queued}
    for number in range(claims):
        for vae in queued:
            started = time.perf_counter()
            held = store.claim(token=f"{vae}{number}", worker="bench", vaes=[vae], max_jobs=8, max_px=10**9)
            times[vae].append(time.perf_counter() - started)
            assert len(held) == 8
            store.release(held)
    short_us, long_us = (statistics.median(times[vae]) * 1e6 for vae in queued)
    return {
        "queued": [few, many],
        "claim_us": [short_us, long_us],
        "ratio": long_us / short_us,
        "bar": 1.5,
    }


def memory_per_job(running: Bench, *, jobs: int) -> dict[str, Any]:
    """Growth of the broker's used memory for each queued and each finished job, blobs of 1 kB and 12 kB included."""
    client = noop_client(running)
    admin = running.client.store.connections.commands

    def used() -> int:
        return int(admin.info("memory")["used_memory"])

    before = used()
    handles = [client.submit(_LATENTS, vae="noop", output="uint8", provenance=False) for _ in range(jobs)]
    queued = used() - before
    with running.worker("fast", module="benchmarks.noop_worker", vae="noop"):
        for _ in client.as_completed(handles, timeout=300):
            pass
        finished = used() - before
    return {"jobs": jobs, "bytes_per_queued_job": queued / jobs, "bytes_per_finished_job": finished / jobs}


def main(*, jobs: int = 1500, samples: int = 500, many: int = 100_000, claims: int = 200) -> dict[str, Any]:
    """Runs everything and stores the figures."""
    figures: dict[str, Any] = {}
    with bench() as running:
        figures["latency"] = latency(running, samples=samples)
        exact = ours_per_s(running, mode="exact", jobs=jobs)
        fast = ours_per_s(running, mode="fast", jobs=jobs)
        stock = stock_per_s(running, jobs=jobs)
        http = sync_http_per_s(jobs=jobs)
        figures["noop_decodes"] = {
            "exact_per_s": exact,
            "fast_per_s": fast,
            "stock_simple_worker_per_s": stock,
            "sync_http_thread_queue_per_s": http,
            "ratio_fast_to_stock": fast / stock,
            "ratio_exact_to_stock": exact / stock,
            "ratio_fast_to_http": fast / http,
            "bar_to_stock": 3.0,
        }
        figures["memory"] = memory_per_job(running, jobs=min(jobs, 1000))
    with bench() as running:
        figures["claim_cost"] = claim_cost(running, few=10, many=many, claims=claims)
    write_result("queue_cost", figures)
    return figures


if __name__ == "__main__":
    Path(__file__).parent.mkdir(exist_ok=True)
    print(json.dumps(main(), indent=2))
