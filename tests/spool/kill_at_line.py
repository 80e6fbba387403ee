"""Keeps a job, or flushes a spool, in child processes that SIGKILL themselves before their first, second, … line.

`python -m tests.spool.kill_at_line keep|flush FOLDER BROKER_URL`; prints how many lines there were. Exits with what is
wrong, if after some death a promise does not hold: a job that was in the spool is in the spool, or in the broker; what
lies in the spool is whole; and the next keep or flush goes on as if nothing had happened.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from broker_config.connection import connect_url
from broker_config.errors import JobNotFound
from broker_config.settings import Settings, load_settings
from producer import DecodeClient, spool, spool_flush, submit_attempt
from producer.spool import Spool
from producer.spool_flush import flush
from producer.submit_attempt import SubmitAttempt

#: Whose lines are counted.
WATCHED = {str(module.__file__) for module in (spool, spool_flush, submit_attempt)}
LATENTS = np.random.default_rng(3).standard_normal((1, 4, 4, 4)).astype(np.float32)
JOBS_A_FLUSH = 2


def die_before_line(number: int) -> None:
    """From now on this process kills itself before the `number`-th line of a watched module."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def survives(work: Callable[[], object], number: int) -> bool:
    """Whether `work` was done before line `number` came."""
    child = os.fork()
    if child == 0:
        die_before_line(number)
        work()
        sys.settrace(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert status == 0, f"the child failed with {status} at line {number}"
    return True


def client_of(settings: Settings) -> DecodeClient:
    assert settings.redis_url is not None
    return DecodeClient(connect_url(settings.redis_url.get_secret_value(), name="latentq-test"), settings=settings)


def attempt_of(client: DecodeClient, job_id: str) -> SubmitAttempt:
    return client.attempt(client.taken(LATENTS), vae="sd", job_id=job_id)


def kill_keeps(folder: Path, settings: Settings) -> int:
    """A keep, killed before each of its lines."""
    client = client_of(settings)
    number = 0
    while True:
        number += 1
        kept = Spool(folder / str(number))
        attempt = attempt_of(client, f"job-{number}")

        def work(kept: Spool = kept, attempt: SubmitAttempt = attempt) -> None:
            kept.keep(attempt.request, attempt.tensor)

        done = survives(work, number)
        for entry in kept.entries():  # whole, or not there
            request, tensor, _ = kept.read(entry)
            assert (request, tensor.data) == (attempt.request, attempt.tensor.data)
        assert not done or len(kept.entries()) == 1
        kept.keep(attempt.request, attempt.tensor)
        assert [entry.job_id for entry in kept.entries()] == [attempt.job_id]
        if done:
            return number


def kill_flushes(folder: Path, settings: Settings) -> int:
    """A flush of several jobs, killed before each of its lines."""
    client = client_of(settings)
    number = 0
    while True:
        number += 1
        kept = Spool(folder / str(number))
        ids = {f"job-{number}-{index}" for index in range(JOBS_A_FLUSH)}
        for job_id in sorted(ids):
            attempt = attempt_of(client, job_id)
            kept.keep(attempt.request, attempt.tensor)

        def work(kept: Spool = kept) -> None:
            own = client_of(settings)  # a connection must not be shared with the parent
            report = flush(kept, store=own.store, blobs=own.blobs)
            assert len(report.sent) == JOBS_A_FLUSH

        done = survives(work, number)
        assert {entry.job_id for entry in kept.entries()} | in_broker(client, ids) == ids, f"lost before line {number}"
        report = flush(kept, store=client.store, blobs=client.blobs)
        assert (report.stopped_by, report.aside) == (None, [])
        assert in_broker(client, ids) == ids
        assert kept.is_empty()
        client.store.retire(*(client.store.cancel(job_id) and job_id for job_id in sorted(ids)))
        if done:
            return number


def in_broker(client: DecodeClient, ids: set[str]) -> set[str]:
    found = set()
    for job_id in ids:
        try:
            client.store.snapshot(job_id)
        except JobNotFound:
            continue
        found.add(job_id)
    return found


if __name__ == "__main__":
    what, where, url = sys.argv[1:]
    own = load_settings(redis_url=url, _env_file=None)
    print({"keep": kill_keeps, "flush": kill_flushes}[what](Path(where), own))
