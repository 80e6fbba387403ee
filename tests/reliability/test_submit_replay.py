"""Submit is safe to repeat after any of its commands, and a replay changes nothing, ever.

Small latents travel with the job, in one script. Large ones: admission is asked, they are stored under a provisional
lifetime, and the job takes them over.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import redis
from safetensors.numpy import load as load_safetensors

from broker_config import keys
from broker_config.blob_store import RedisBlobStore
from broker_config.connection import connect_url
from broker_config.errors import BrokerUnreachable, JobConflict
from broker_config.job_store import JobStore
from broker_config.messages import DecodeRequest, JobStatus
from broker_config.settings import Settings, load_settings
from producer import DecodeClient
from tests.support.broker_contents import assert_same, everything
from tests.support.faulty_proxy import FaultyProxy
from tests.support.processes import ROOT
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

_HANDSHAKE: Final = ("HELLO", "CLIENT", "CLIENT", "CLIENT", "CLIENT")
#: A script that the broker does not know yet.
_NEW_SCRIPT: Final = ("EVALSHA", "SCRIPT", "EVALSHA")


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of latents into the broker."""

    latents: np.ndarray[Any, Any]
    #: Every command of one submit by a client that has no connection yet, to a broker that has no script yet.
    commands: tuple[str, ...]

    @property
    def reserved_bytes(self) -> int:
        """A VAE that enlarges by 8, with 2 bytes reserved for each pixel of a PNG."""
        rows, columns = self.latents.shape[-2:]
        return int(rows * columns) * 64 * 2


LATENTS: Final = np.random.default_rng(7).standard_normal((1, 4, 8, 8)).astype(np.float32)
SMALL: Final = Way(latents=LATENTS, commands=(*_HANDSHAKE, *_NEW_SCRIPT))
LARGE: Final = Way(
    latents=np.random.default_rng(7).standard_normal((1, 4, 272, 272)).astype(np.float32),
    commands=(*_HANDSHAKE, *_NEW_SCRIPT, *_HANDSHAKE, "MULTI", "SET", "PEXPIRE", "EXEC", *_NEW_SCRIPT),
)
WAYS: Final = [pytest.param(SMALL, id="small"), pytest.param(LARGE, id="large")]
POINTS: Final = [
    pytest.param(way, n, id=f"{label}-{n:02}-{name}")
    for label, way in (("small", SMALL), ("large", LARGE))
    for n, name in enumerate(way.commands, start=1)
]
QUEUE: Final = "rq:queue:latentq.sd.normal"


@pytest.fixture
def admin(broker_url: str) -> Iterator[redis.Redis]:
    """The broker, past the proxy, without any script loaded."""
    with redis.Redis.from_url(broker_url) as opened:
        opened.script_flush()
        yield opened


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultyProxy]:
    """What loses commands and replies between a client and the broker."""
    with FaultyProxy(broker_url) as between:
        yield between


@pytest.fixture
def producer_settings(broker_url: str) -> Settings:
    """Settings of a producer that knows our own catalogue."""
    return load_settings(redis_url=broker_url, _env_file=None)


@pytest.fixture
def open_client(producer_settings: Settings) -> Iterator[Callable[..., DecodeClient]]:
    """Makes clients of a URL; closes them with the test."""
    opened: list[DecodeClient] = []

    def make(url: str, *, retries: int = 3, **overrides: Any) -> DecodeClient:
        settings = producer_settings.model_copy(update=overrides)
        made = DecodeClient(connect_url(url, name="latentq-test", retries=retries), settings=settings)
        opened.append(made)
        return made

    yield make
    for made in opened:
        made.close()


@pytest.fixture
def worker(broker_url: str, producer_settings: Settings) -> Iterator[StoreWorker]:
    """A worker that does nothing but talk to the broker."""
    connections = connect_url(broker_url, name="latentq-test-worker")
    yield StoreWorker(JobStore(connections, producer_settings))
    connections.close()


def assert_accepted_once(admin: Any, job_id: str, way: Way = SMALL) -> None:
    """The broker holds one queued job with these latents, whole, once, and nothing else."""
    record = {name.decode(): value for name, value in admin.hgetall(keys.job(job_id)).items()}
    request = DecodeRequest.from_wire(record["message"])
    blob = request.latents.name
    assert set(admin.scan_iter()) == {
        key.encode()
        for key in (
            keys.job(job_id),
            keys.rq_job(job_id),
            keys.blob(blob),
            keys.owners(blob),
            keys.TOTALS,
            keys.bell("sd"),
            QUEUE,
            "rq:queues",
        )
    }
    assert admin.lrange(QUEUE, 0, -1) == [job_id.encode()]
    assert admin.zrange(keys.owners(blob), 0, -1) == [job_id.encode()]
    assert admin.zscore(keys.owners(blob), job_id) == float("inf")
    data = admin.get(keys.blob(blob))
    assert isinstance(data, bytes)
    (tensor,) = load_safetensors(data).values()
    np.testing.assert_array_equal(tensor, way.latents)
    assert (request.job_id, request.latents.size_bytes) == (job_id, len(data))
    assert admin.hgetall(keys.TOTALS) == {
        b"jobs": b"1",
        b"latents_bytes": str(len(data)).encode(),
        b"reserved_bytes": str(way.reserved_bytes).encode(),
        b"px": record["px"],
    }
    assert record["state"] == b"queued"
    assert admin.hget(keys.rq_job(job_id), "status") == b"queued"
    for key in (keys.job(job_id), keys.rq_job(job_id), keys.blob(blob), keys.owners(blob)):
        assert admin.ttl(key) == -1, key


def assert_nothing_stays(admin: Any) -> None:
    """What the broker holds goes by itself."""
    assert {key for key in admin.scan_iter() if admin.ttl(key) < 0} == set()
    assert admin.llen(QUEUE) == 0


# A lost reply, a lost connection -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_submit_sends_the_commands_listed_here(
    way: Way, admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    job = open_client(proxy.url).submit(way.latents, vae="sd")
    assert tuple(proxy.commands) == way.commands
    assert_accepted_once(admin, job.id, way)


@pytest.mark.parametrize("fault", ["swallow_reply", "cut_before"])
@pytest.mark.parametrize(("way", "nth"), POINTS)
def test_the_drivers_own_repeats_accept_a_job_once(
    way: Way, nth: int, fault: str, admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    rule = getattr(proxy, fault)(nth=nth)
    job = open_client(proxy.url).submit(way.latents, vae="sd")
    assert rule.struck
    assert_accepted_once(admin, job.id, way)


@pytest.mark.parametrize("fault", ["swallow_reply", "cut_before"])
@pytest.mark.parametrize(("way", "nth"), POINTS)
def test_a_caller_who_repeats_with_the_errors_job_id_gets_one_job(
    way: Way, nth: int, fault: str, admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(proxy.url, retries=0)
    rule = getattr(proxy, fault)(nth=nth)
    with pytest.raises(BrokerUnreachable) as caught:
        client.submit(way.latents, vae="sd")
    assert rule.struck
    assert caught.value.job_id is not None
    job = client.submit(way.latents, vae="sd", job_id=caught.value.job_id)
    assert job.id == caught.value.job_id
    assert_accepted_once(admin, job.id, way)


def test_a_broker_that_refuses_connections_is_an_error_that_says_so_and_a_repeat_is_accepted_once(
    admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(proxy.url, retries=0)
    client.ping()
    with proxy.refused(), pytest.raises(BrokerUnreachable, match="does not answer") as caught:
        client.submit(LATENTS, vae="sd")
    job = client.submit(LATENTS, vae="sd", job_id=caught.value.job_id)
    assert_accepted_once(admin, job.id)


# Replays -----------------------------------------------------------------------------------------------------


def _queued(worker: StoreWorker, job_id: str) -> None:
    pass


def _processing(worker: StoreWorker, job_id: str) -> None:
    worker.claim_one()


def _succeeded(worker: StoreWorker, job_id: str) -> None:
    worker.succeed(worker.claim_one())


def _failed(worker: StoreWorker, job_id: str) -> None:
    worker.fail(worker.claim_one())


def _canceled(worker: StoreWorker, job_id: str) -> None:
    worker.store.cancel(job_id)


def _expired(worker: StoreWorker, job_id: str) -> None:
    _succeeded(worker, job_id)
    worker.store.retire(job_id)


@pytest.mark.parametrize("bring_to", [_queued, _processing, _succeeded, _failed, _canceled, _expired])
def test_a_replay_at_any_time_of_a_jobs_life_returns_that_job_and_changes_nothing(
    bring_to: Callable[[StoreWorker, str], None],
    admin: redis.Redis,
    worker: StoreWorker,
    broker_url: str,
    open_client: Callable[..., DecodeClient],
) -> None:
    client = open_client(broker_url)
    job = client.submit(LATENTS, vae="sd", job_id="replayed")
    bring_to(worker, job.id)
    assert job.status().value == bring_to.__name__.strip("_")
    before = everything(admin)
    again = client.submit(LATENTS, vae="sd", job_id="replayed")
    assert again.id == job.id
    assert_same(before, everything(admin))


def test_a_replay_does_not_lengthen_a_retention_that_is_shorter_than_the_provisional_lifetime(
    admin: redis.Redis, worker: StoreWorker, broker_url: str, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(broker_url)
    client.submit(LATENTS, vae="sd", job_id="short", retention_s=60.0)
    _succeeded(worker, "short")
    before = everything(admin)
    client.submit(LATENTS, vae="sd", job_id="short", retention_s=60.0)
    assert_same(before, everything(admin))


def test_a_replay_after_the_latents_expired_but_before_the_janitor_came_stores_nothing(
    admin: redis.Redis, worker: StoreWorker, broker_url: str, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(broker_url)
    job = client.submit(LATENTS, vae="sd", job_id="over", retention_s=0.05)
    _failed(worker, "over")
    request = job.snapshot().request
    assert request is not None
    blob = keys.blob(request.latents.name)
    wait_until(lambda: not admin.exists(blob, keys.rq_job("over"), keys.rq_results("over")), what="retention to end")
    before = everything(admin)
    client.submit(LATENTS, vae="sd", job_id="over", retention_s=0.05)
    assert_same(before, everything(admin))
    assert job.status() is JobStatus.EXPIRED


@pytest.mark.parametrize("bring_to", [_queued, _processing, _succeeded, _failed, _canceled, _expired])
@pytest.mark.parametrize("other", ["latents", "options"])
def test_an_id_used_for_something_else_is_a_conflict_and_the_accepted_job_stays_as_it_is(
    other: str,
    bring_to: Callable[[StoreWorker, str], None],
    admin: redis.Redis,
    worker: StoreWorker,
    broker_url: str,
    open_client: Callable[..., DecodeClient],
) -> None:
    client = open_client(broker_url)
    client.submit(LATENTS, vae="sd", job_id="taken")
    bring_to(worker, "taken")
    before = everything(admin)
    latents, output = (LATENTS + 1, None) if other == "latents" else (LATENTS, "webp")
    with pytest.raises(JobConflict) as caught:
        client.submit(latents, vae="sd", job_id="taken", output=output)
    assert caught.value.job_id == "taken"
    assert_same(before, everything(admin))


def test_many_clients_that_submit_one_job_at_once_make_one_job(
    admin: redis.Redis, broker_url: str, open_client: Callable[..., DecodeClient]
) -> None:
    clients = [open_client(broker_url) for _ in range(8)]
    start = threading.Barrier(len(clients))
    errors: list[BaseException] = []

    def submit(client: DecodeClient) -> None:
        start.wait()
        try:
            for _ in range(5):
                client.submit(LATENTS, vae="sd", job_id="together")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=submit, args=(client,), name="submitter") for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_accepted_once(admin, "together")


# The provisional blob ----------------------------------------------------------------------------------------


def _submit_in_thread(client: DecodeClient) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def submit() -> None:
        try:
            outcome.append(client.submit(LARGE.latents, vae="sd", job_id="slow"))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=submit, name="submitter")
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("how", ["deleted", "expired"])
def test_latents_that_are_gone_before_the_job_is_accepted_are_stored_again(
    how: str, admin: redis.Redis, proxy: FaultyProxy, open_client: Callable[..., DecodeClient]
) -> None:
    client = open_client(proxy.url, provisional_s=900.0 if how == "deleted" else 0.5)
    second_step = proxy.hold(nth=len(LARGE.commands) - len(_NEW_SCRIPT) + 1)
    thread, outcome = _submit_in_thread(client)
    second_step.wait()
    (blob,) = admin.keys(keys.blob("*"))
    if how == "deleted":
        admin.delete(blob)
    else:
        wait_until(lambda: not admin.exists(blob), what="the provisional lifetime to end")
    second_step.release()
    thread.join()
    assert [job.id for job in outcome] == ["slow"]
    assert_accepted_once(admin, "slow", LARGE)


def test_storing_a_blob_again_neither_replaces_bytes_nor_shortens_its_life(admin: redis.Redis, broker_url: str) -> None:
    connections = connect_url(broker_url, name="latentq-test")
    long, short = (RedisBlobStore(connections, provisional_s=seconds) for seconds in (900.0, 1.0))
    long.put("once", b"first")
    short.put("once", b"second")
    connections.close()
    assert admin.get(keys.blob("once")) == b"first"
    assert 890_000 < admin.pttl(keys.blob("once")) <= 900_000


# A producer that is killed -----------------------------------------------------------------------------------

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
