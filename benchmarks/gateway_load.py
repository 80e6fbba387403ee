"""One gateway under load: slow clients, long-polls and large uploads beside small decodes, and an idle control run.

The gateway shares a core with a no-op worker; the broker and this client have the other. How long its loop stalls is
measured inside its process, by a task that sleeps 5 ms at a time and notes how late it wakes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
import numpy as np

from benchmarks.harness import Bench, bench, on_core, percentile, write_result
from broker_config.connection import connect
from broker_config.latent_geometry import LatentLayout
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog, VaeEntry

SLOW_CLIENTS: Final = 200
LONG_POLLS: Final = 500
#: The one bar the issue of stalls has: this much above the idle run.
STALL_BAR_MS: Final = 20.0
#: A VAE that no worker serves: what is submitted to it waits.
UNSERVED: Final = "sdxl"
_TICK_S: Final = 0.005
_LOAD_S: Final = 20.0
#: 15 MB of float32 latents for a picture of 7680 × 8192.
_LARGE: Final = (1, 4, 960, 1024)
_SMALL: Final = (1, 4, 8, 8)


def serve_measured() -> None:
    """The gateway itself: prints its URL, then, for each line it reads, the longest stall since the last one, in ms."""
    from producer.gateway.__main__ import SWITCH_S
    from producer.gateway.app import build_app, serve
    from producer.gateway.settings import load_gateway_settings

    settings = load_settings(_env_file=None)
    own = load_gateway_settings(port=0, max_uploads=1024, _env_file=None)
    connections = connect(settings, name="latentq-bench-gateway")
    sys.setswitchinterval(SWITCH_S)
    stalls = [0.0]

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def asked() -> None:
            if not sys.stdin.readline():
                stop.set()
                loop.remove_reader(sys.stdin.fileno())
                return
            print(1000 * stalls[0], flush=True)
            stalls[0] = 0.0

        async def measure() -> None:
            while True:
                begin = time.perf_counter()
                await asyncio.sleep(_TICK_S)
                stalls[0] = max(stalls[0], time.perf_counter() - begin - _TICK_S)

        loop.add_reader(sys.stdin.fileno(), asked)
        measuring = asyncio.create_task(measure(), name="measure-stalls")
        app = build_app(connections, settings, own, catalog=_catalog())
        await serve(app, own, announce=lambda url: print(url, flush=True), stop=stop)
        measuring.cancel()

    asyncio.run(main())


def _catalog() -> VaeCatalog:
    """Ours, and the VAE of the no-op worker."""
    noop = VaeEntry(
        name="noop", title="does nothing", weights="latentq:demo", vae_class="AutoencoderKL", channels=4, spatial=8,
        layouts=(LatentLayout.UNPACKED,),
    )  # fmt: skip
    return VaeCatalog({**VaeCatalog.load(), "noop": noop})


class Load:
    """What clients do, and how long their answers took."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._session = session
        self.errors: list[str] = []
        self.looks_s: list[float] = []
        self.polls = 0
        self.slow = 0
        self.uploads_s: list[float] = []

    async def submit(self, shape: tuple[int, ...] = _SMALL, *, vae: str = "noop") -> str:
        """Submits zeros; returns the job's path."""
        body = np.zeros(shape, dtype=np.float32).tobytes()
        query = f"vae={vae}&dtype=float32&shape={','.join(map(str, shape))}&output=jpg"
        headers = {"Content-Type": "application/octet-stream"}
        async with self._session.post(f"{self.url}/v1/decodes?{query}", data=body, headers=headers) as answer:
            told = await answer.json()
            if answer.status != 202:
                self.errors.append(f"submit {answer.status} {told.get('code')}")
                return ""
            return str(told["urls"]["self"])

    async def decodes(self) -> None:
        """Small jobs, one after the other: submit, long-poll, look."""
        while True:
            path = await self.submit()
            await self.poll(path)
            begin = time.perf_counter()
            async with self._session.get(self.url + path) as answer:
                await answer.read()
                if answer.status != 200:
                    self.errors.append(f"look {answer.status}")
            self.looks_s.append(time.perf_counter() - begin)

    async def poll(self, path: str, *, wait_s: float = 25.0) -> None:
        """One long-poll."""
        async with self._session.get(f"{self.url}{path}?wait={wait_s}") as answer:
            await answer.read()
            self.polls += 1
            if answer.status != 200:
                self.errors.append(f"poll {answer.status}")

    async def slow_client(self) -> None:
        """Sends small latents at 100 bytes a second, over a bare connection."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        body = np.zeros(_SMALL, dtype=np.float32).tobytes()
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(
                b"POST /v1/decodes?vae=sdxl&dtype=float32&shape=1,4,8,8 HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/octet-stream\r\nConnection: close\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
            )
            for start in range(0, len(body), 64):
                writer.write(body[start : start + 64])
                await writer.drain()
                await asyncio.sleep(0.6)
            status = (await reader.readline()).split()[1:2]
            self.slow += 1
            if status != [b"202"]:
                self.errors.append(f"slow client {status}")
        finally:
            writer.close()


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0, family=socket.AF_INET)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=120)) as opened:
        yield opened


async def _crowd(url: str, waits_for: list[str], *, load_s: float) -> dict[str, Any]:
    """Slow clients and long-polls for a while, small decodes beside them."""
    async with _session() as session:
        load = Load(url, session)
        begin = time.perf_counter()
        decoding = [asyncio.create_task(load.decodes()) for _ in range(2)]
        crowd = [asyncio.create_task(load.slow_client()) for _ in range(SLOW_CLIENTS)]
        crowd += [asyncio.create_task(load.poll(path, wait_s=load_s)) for path in waits_for]
        await asyncio.gather(*crowd)
        for task in decoding:
            task.cancel()
        await asyncio.gather(*decoding, return_exceptions=True)
        looks_ms = [1000 * look for look in load.looks_s]
        return {
            "slow_clients": load.slow,
            "long_polls": len(waits_for),
            "errors": load.errors[:20],
            "error_count": len(load.errors),
            "small_decodes_per_s": len(looks_ms) / (time.perf_counter() - begin),
            "look_p50_ms": percentile(looks_ms, 0.5),
            "look_p99_ms": percentile(looks_ms, 0.99),
        }


async def _uploads(url: str, count: int) -> dict[str, Any]:
    """Large uploads, one after the other."""
    async with _session() as session:
        load = Load(url, session)
        took = []
        for _ in range(count):
            begin = time.perf_counter()
            await load.submit(_LARGE, vae=UNSERVED)
            took.append(time.perf_counter() - begin)
        return {"megabytes": np.prod(_LARGE).item() * 4 / 1e6, "seconds": took, "errors": load.errors}


def _measure(running: Bench, url: str, gateway: subprocess.Popen[str], *, rounds: int, load_s: float) -> dict[str, Any]:
    assert gateway.stdin is not None
    assert gateway.stdout is not None
    ask, answers = gateway.stdin, gateway.stdout

    def stall_ms() -> float:
        ask.write("stall\n")
        ask.flush()
        return float(answers.readline())

    # What the polls wait for: jobs of a VAE that nobody serves.
    shape = (1, 4, 8, 8)
    waits_for = [
        f"/v1/decodes/{running.client.submit(np.zeros(shape, dtype=np.float32), vae=UNSERVED).id}"
        for _ in range(LONG_POLLS)
    ]
    asyncio.run(_uploads(url, 1))  # warm
    idle, loaded = [], []
    for _ in range(rounds):
        stall_ms()
        time.sleep(2)
        idle.append(stall_ms())
        uploads = asyncio.run(_uploads(url, 2))
        loaded.append(stall_ms())
    stall_ms()
    crowd = asyncio.run(_crowd(url, waits_for, load_s=load_s))
    crowd["stall_ms"] = stall_ms()
    return {
        "crowd": crowd,
        "uploads": uploads,
        "stall_idle_ms": idle,
        "stall_uploading_ms": loaded,
        "stall_above_idle_ms": max(loaded) - max(idle),
        "stall_above_idle_median_ms": statistics.median(loaded) - statistics.median(idle),
        "bar_ms": STALL_BAR_MS,
    }


def main(*, rounds: int = 6, load_s: float = _LOAD_S) -> dict[str, Any]:
    """Runs the loads and stores the figures."""
    with bench() as running:
        command = [sys.executable, "-m", "benchmarks.gateway_load", "--serve"]
        gateway = on_core(
            running.cores.worker, command, running.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            url = gateway.stdout.readline().strip()
            with running.worker("exact", module="benchmarks.noop_worker", vae="noop"):
                figures = _measure(running, url, gateway, rounds=rounds, load_s=load_s)
        finally:
            gateway.stdin.close()
            gateway.wait(30)
    write_result("gateway_load", figures)
    return figures


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve_measured()
        sys.exit()
    print(json.dumps(main(), indent=2))
