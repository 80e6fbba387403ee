"""A worker is SIGKILLed before and after each thing it says to the broker about a job; the job succeeds all the same.

The steps are what one job costs, in order: claim, read latents that are too large to come along with the claim, tell
that it is on the device, store an artifact that is too large to come along with the success, complete. `before`: the
command was sent and never arrived. `after`: the broker executed it, the worker never knew.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydantic import SecretStr

from broker_config import keys
from broker_config.blob_store import INLINE_BYTES
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.job_store import ALONG_BYTES
from broker_config.scripts import source
from broker_config.settings import Settings
from producer import DecodeClient, JobHandle, JobStatus
from tests.chaos.crew import Member
from tests.support.faulty_proxy import FaultyProxy
from tests.support.processes import environment_of
from tests.support.wait import wait_until
from worker.janitor import Janitor

_numbers = itertools.count()
SMALL = (1, 4, 8, 8)
#: 320 × 320 × 12 bytes as a tensor.
LARGE = (1, 4, 40, 40)
assert INLINE_BYTES < 320 * 320 * 12
#: 147,456 bytes of latents.
WIDE = (1, 4, 96, 96)
assert ALONG_BYTES < 4 * 96 * 96 * 4
#: Step → (command, script, shape of the latents). One job sends each of them once.
STEPS = {
    "claim": ("EVALSHA", "claim", SMALL),
    "read large latents": ("MGET", None, WIDE),
    "tell the device stage": ("EVALSHA", "renew", SMALL),
    "complete, artifact included": ("EVALSHA", "complete", SMALL),
    "store a large artifact": ("EVALSHA", "store", LARGE),
    "complete with a large artifact": ("EVALSHA", "complete", LARGE),
}
POINTS = [(step, when) for step in STEPS for when in ("before", "after")]


def digest_of(script: str) -> bytes:
    return hashlib.sha1(source(script).encode()).hexdigest().encode()


@pytest.fixture
def worker_at(
    settings: Settings, broker_server: EmbeddedBroker, tmp_path: Path
) -> Iterator[tuple[FaultyProxy, Member]]:
    """A worker that reaches the broker through a proxy, ready."""
    with FaultyProxy(broker_server.url) as proxy:
        # Leases are renewed rarely, so that the only renewal in the way is the one a test waits for.
        far = settings.model_copy(update={"redis_url": SecretStr(proxy.url)})
        member = Member(
            kind="worker", number=next(_numbers), environment=environment_of(far), log=tmp_path / "worker.log"
        )
        member.start()
        yield proxy, member
        proxy.reset()
        member.end()


@pytest.mark.parametrize(("step", "when"), POINTS, ids=[f"{when} {step}" for step, when in POINTS])
def test_a_worker_killed_here_loses_nothing(
    step: str,
    when: str,
    client: DecodeClient,
    settings: Settings,
    worker_at: tuple[FaultyProxy, Member],
) -> None:
    proxy, member = worker_at
    wait_until(lambda: client.store.served({"sd"}), timeout_s=60, what="the worker")
    command, script, shape = STEPS[step]
    latents = np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def submit() -> JobHandle:
        return client.submit(latents, vae="sd", provenance=False, output="tensor")

    undisturbed = submit()
    undisturbed.wait(60)
    argument = digest_of(script) if script else None
    if script == "claim":  # an idle worker looks for work all the time; the one that finds it is the second
        rule = proxy.hold(command=command, argument=argument) if when == "before" else None
    elif when == "before":
        rule = proxy.hold(command=command, argument=argument)
    else:
        rule = proxy.hold_reply(command=command, argument=argument)
    if rule is None:
        rule = proxy.hold_reply(command=command, argument=argument)
        rule.wait()  # the idle look is held; its answer was "nothing"
        rule.release()
        job = submit()
        wait_until(lambda: job.status() is not JobStatus.QUEUED, what="the claim")
    else:
        job = submit()
        rule.wait()
    died_holding = job.status()
    member.kill()
    rule.release()
    janitor = Janitor(client.store, name="test")
    client.store.reap("test", quiet_s=3600)
    client.store.connections.commands.hset(keys.REAPER, "grace_ms", 0)
    member.start()

    def ended() -> bool:
        janitor.tick()
        return job.status().is_terminal

    wait_until(ended, timeout_s=60, what=f"the job whose worker died {when} {step}")
    snapshot = job.snapshot()
    assert snapshot.status is JobStatus.SUCCEEDED, snapshot.errors
    assert job.artifacts()[0][1] == undisturbed.artifacts()[0][1]
    assert snapshot.attempts <= 2
    assert died_holding in (JobStatus.QUEUED, JobStatus.PROCESSING, JobStatus.SUCCEEDED)
    totals = client.store.connections.commands.hgetall(keys.TOTALS)
    assert set(totals.values()) == {b"0"}
