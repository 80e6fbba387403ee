"""Deliveries/s of one courier to a fast receiver, alone and while another receiver hangs. Bar: it loses less than 5 %.

Both are measured in turns in one run (first one, then the other, then the other way round), each time with a fresh
courier and a broker that holds as many jobs: a backlog is there before the courier starts, in which the hanging
receiver's deliveries come first; what counts is the time between the first and the last request at the fast one. All of
it lies within the timeout of the first attempts at the hanging one, before its circuit breaker can help.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import redis
from pydantic import SecretStr

from benchmarks.harness import Bench, bench, on_core, write_result
from broker_config.webhook_secrets import new_secret
from producer import DecodeClient

_LATENTS = np.zeros((1, 4, 8, 8), dtype=np.float32)
_LINK_KEY = "k" * 32
_ALLOW = "http://127.0.0.1:*"

#: Two servers in one process: one answers 204 and notes when, the other reads and says nothing. They write their ports,
#: and for each line they read the times of what came in since.
_RECEIVERS = """
import asyncio, json, sys, time
from aiohttp import web

times = []

async def fast(request):
    await request.read()
    times.append(time.monotonic())
    return web.Response(status=204)

async def hang(request):
    await request.read()
    await asyncio.Event().wait()

async def listen(handler):
    app = web.Application()
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner.addresses[0][1]

async def main():
    print(json.dumps([await listen(fast), await listen(hang)]), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(times), flush=True)
        times.clear()

asyncio.run(main())
"""


@contextlib.contextmanager
def receivers(running: Bench) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, the URL of the fast one and that of the one that hangs."""
    process = on_core(
        running.cores.others,
        [sys.executable, "-c", _RECEIVERS],
        running.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    fast, hanging = json.loads(process.stdout.readline())
    yield process, f"http://127.0.0.1:{fast}/hook", f"http://127.0.0.1:{hanging}/hook"
    process.kill()
    process.wait()


def per_s(running: Bench, server: subprocess.Popen[str], fast: str, *, beside: str | None, deliveries: int) -> float:
    """Deliveries/s at `fast`. `beside`: who gets as many; None: nobody, those jobs have no webhook."""
    with redis.Redis.from_url(running.environment["LATENTQ_REDIS_URL"]) as admin:
        admin.flushall()
    client = DecodeClient(
        running.client.store.connections,
        settings=running.settings.model_copy(
            update={"public_url": "https://queue.example", "link_key": SecretStr(_LINK_KEY), "webhook_allow": (_ALLOW,)}
        ),
        catalog=running.client.catalog,
    )
    secret = new_secret()
    for url in (beside, fast):
        signed = None if url is None else secret
        for _ in range(deliveries):
            client.submit(_LATENTS, vae="sd", webhook=url, webhook_secret=signed).cancel()
    environment = running.environment | {
        "LATENTQ_PUBLIC_URL": "https://queue.example",
        "LATENTQ_LINK_KEY": _LINK_KEY,
        "LATENTQ_WEBHOOK_ALLOW": _ALLOW,
    }
    courier = on_core(running.cores.worker, [sys.executable, "-m", "worker.courier"], environment)
    times: list[float] = []
    deadline = time.monotonic() + 300
    while len(times) < deliveries:
        if courier.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{len(times)} of {deliveries} deliveries came (courier: {courier.poll()})")
        time.sleep(0.5)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write("\n")
        server.stdin.flush()
        times += json.loads(server.stdout.readline())
    courier.kill()
    courier.wait()
    return (deliveries - 1) / (max(times) - min(times))


def main(*, deliveries: int = 1000, rounds: int = 10) -> dict[str, Any]:
    """Measures, stores and returns the figures."""
    alone: list[float] = []
    beside: list[float] = []
    with bench() as running, receivers(running) as (server, fast, hanging):
        per_s(running, server, fast, beside=None, deliveries=deliveries // 4)  # warms the processes' and disk's caches
        for number in range(rounds):
            order = ((alone, None), (beside, hanging))
            for figures, other in order if number % 2 == 0 else reversed(order):
                figures.append(per_s(running, server, fast, beside=other, deliveries=deliveries))
    ratios = [with_it / without for with_it, without in zip(beside, alone, strict=True)]
    result = {
        "deliveries": deliveries,
        "rounds": rounds,
        "alone_per_s": alone,
        "beside_a_hanging_one_per_s": beside,
        "alone_median_per_s": statistics.median(alone),
        "beside_median_per_s": statistics.median(beside),
        "ratio_of_medians": statistics.median(beside) / statistics.median(alone),
        "ratio_median": statistics.median(ratios),
        "bar": 0.95,
    }
    write_result("webhook_isolation", result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.webhook_isolation")
    parser.add_argument("--deliveries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    print(json.dumps(main(deliveries=arguments.deliveries, rounds=arguments.rounds), indent=2))
