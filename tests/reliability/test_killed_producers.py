"""A producer killed after any of its commands leaves a job, or nothing that stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from broker_config import keys
from producer import DecodeClient
from tests.support.faulty_proxy import FaultyProxy
from tests.support.processes import ROOT
from tests.support.submit_ways import (
    POINTS,
    QUEUE,
    WAYS,
    Way,
    assert_accepted_once,
)
from tests.support.wait import wait_until


def assert_nothing_stays(admin: Any) -> None:
    """What the broker holds goes by itself."""
    assert {key for key in admin.scan_iter() if admin.ttl(key) < 0} == set()
    assert admin.llen(QUEUE) == 0


#: Forks a producer for each line `url job_id side`; says its pid, then how it ended.
_PRODUCER: Final = """
import os, sys
import numpy as np
from producer import DecodeClient
for line in sys.stdin:
    url, job_id, side = line.split()
    latents = np.random.default_rng(7).standard_normal((1, 4, int(side), int(side))).astype(np.float32)
    pid = os.fork()
    if pid == 0:
        DecodeClient.from_url(url, _env_file=None).submit(latents, vae="sd", job_id=job_id)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Producers:
    """Producer processes, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, url: str, job_id: str, way: Way) -> int:
        """Starts a producer that submits one job; returns its pid."""
        assert self._process.stdin is not None
        print(url, job_id, way.latents.shape[-1], file=self._process.stdin, flush=True)
        return self._answer()

    def exit_code(self) -> int:
        """How the producer ended; blocks until it has. -9: by SIGKILL."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def producers() -> Iterator[Producers]:
    """Starts producer processes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LATENTQ_")}
    command = [sys.executable, "-c", _PRODUCER]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(Path(ROOT))},
    ) as process:
        yield Producers(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=30)


@pytest.mark.parametrize(("way", "nth"), POINTS)
def test_a_producer_killed_after_any_of_its_commands_leaves_a_job_or_nothing_that_stays(
    way: Way,
    nth: int,
    admin: redis.Redis,
    proxy: FaultyProxy,
    producers: Producers,
    broker_url: str,
    open_client: Callable[..., DecodeClient],
) -> None:
    others = len(admin.client_list())
    after = proxy.hold_reply(nth=nth)
    pid = producers.start(proxy.url, "killed", way)
    after.wait()
    os.kill(pid, signal.SIGKILL)
    assert producers.exit_code() == -signal.SIGKILL
    proxy.cut_all()
    wait_until(lambda: len(admin.client_list()) == others, what="the broker to drop the dead producer's connections")
    if nth == len(way.commands):
        assert_accepted_once(admin, "killed", way)
    else:
        assert not admin.exists(keys.job("killed"))
        assert_nothing_stays(admin)
    job = open_client(broker_url).submit(way.latents, vae="sd", job_id="killed")
    assert_accepted_once(admin, job.id, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_producer_that_is_not_killed_ends_well(
    way: Way, admin: redis.Redis, proxy: FaultyProxy, producers: Producers
) -> None:
    producers.start(proxy.url, "whole", way)
    assert producers.exit_code() == 0
    assert tuple(proxy.commands) == way.commands
    assert_accepted_once(admin, "whole", way)
