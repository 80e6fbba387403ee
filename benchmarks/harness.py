"""What every benchmark needs: a broker and a worker on pinned cores, and a place for results."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_config.connection import connect_url
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.queue_report import QueueReport, WorkerState
from broker_config.settings import Settings, load_settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
_store = RESULTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """Which core does what: the worker has one for itself, everything else shares the other."""

    worker: int
    others: int


def pick_cores() -> Cores:
    """The last core for the worker, the first for the rest."""
    available = sorted(os.sched_getaffinity(0))
    return Cores(worker=available[-1], others=available[0])


def one_thread() -> dict[str, str]:
    """Environment of a process that computes with one thread."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LATENTQ_")}
    return environment | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "LATENTQ_LOG_LEVEL": "WARNING",
        "LATENTQ_LEASE_RENEW_S": "0.5",  # a worker's report comes with its renewals
        "HF_HUB_OFFLINE": "1",
    }


def on_core(core: int, command: Sequence[str], environment: Mapping[str, str], **options: Any) -> Any:
    """Starts a process pinned to one core."""
    return subprocess.Popen(
        list(command),
        env=dict(environment),
        cwd=ROOT,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        **options,
    )


@dataclass(slots=True)
class Bench:
    """A running broker with its settings."""

    settings: Settings
    client: DecodeClient
    cores: Cores
    environment: dict[str, str]

    @contextlib.contextmanager
    def worker(self, *arguments: str, module: str = "worker", vae: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker process on its own core, ready when the block starts."""
        command = [sys.executable, "-m", module, *arguments]
        process = on_core(self.cores.worker, command, self.environment)
        try:
            deadline = time.monotonic() + 120
            while not self.client.store.served({vae}):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the worker did not start (status {process.poll()})")
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def worker_report(self, *, jobs: int) -> WorkerState:
        """What the only worker reports, once it has reported at least `jobs` jobs."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            for state in QueueReport(self.client.store.connections).workers():
                if state.jobs >= jobs:
                    return state
            time.sleep(0.05)
        raise RuntimeError(f"no worker reports {jobs} jobs")


def waiting_share(before: WorkerState, after: WorkerState) -> float:
    """Share of the time between two reports in which the device waited for anything but its own work.

    NaN where both are one report: so few jobs were done with before anybody looked.
    """
    busy, idle = after.busy_s - before.busy_s, after.idle_s - before.idle_s
    return idle / (busy + idle) if busy + idle > 0 else math.nan


@contextlib.contextmanager
def bench(catalog: Path | None = None) -> Iterator[Bench]:
    """A broker on the first core, in a folder of its own."""
    cores = pick_cores()
    os.sched_setaffinity(0, {cores.others})
    with (
        tempfile.TemporaryDirectory(prefix="latentq-bench-") as folder,
        EmbeddedBroker(Path(folder), max_memory_bytes=2 << 30) as broker,
    ):
        settings = load_settings(redis_url=broker.url, catalog=catalog, _env_file=None)
        connections = connect_url(broker.url, name="latentq-bench")
        environment = one_thread() | {"LATENTQ_REDIS_URL": broker.url}
        if catalog is not None:
            environment["LATENTQ_CATALOG"] = str(catalog)
        client = DecodeClient(connections, settings=settings, catalog=VaeCatalog.load(catalog))
        yield Bench(settings=settings, client=client, cores=cores, environment=environment)
        connections.close()


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def python_loop_ms() -> float:
    """Time of a million additions: tells how fast this core is now, where a figure is a time and no ratio."""
    started, total = time.perf_counter(), 0
    for number in range(1_000_000):
        total += number * number
    return (time.perf_counter() - started) * 1000


def environment_facts() -> dict[str, Any]:
    """Hardware, versions and commit, for the JSON."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    names = ("latentq", "torch", "diffusers", "redis", "rq", "pillow")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python_loop_ms": python_loop_ms(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit.stdout.strip(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def store_in(folder: Path) -> None:
    """Where this process stores its results."""
    global _store
    _store = folder


def write_result(name: str, figures: Mapping[str, Any]) -> Path:
    """Stores figures with their surroundings as JSON."""
    _store.mkdir(exist_ok=True)
    path = _store / f"{name}.json"
    path.write_text(json.dumps({"figures": figures, **environment_facts()}, indent=2) + "\n")
    return path
