"""The job state machine on a real broker: Valkey as bundled, and Redis as Debian has it (7.0).

A worker here is a `StoreWorker`: it says what a worker says, with no device behind it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from rq.utils import utcformat

from broker_config import job_store, keys, scripts
from broker_config.blob_store import RedisBlobStore
from broker_config.connection import Connections
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import (
    BlobMissing,
    BrokerRefusesWrites,
    JobConflict,
    JobNotFound,
    QueueFull,
    StartDeadlinePassed,
)
from broker_config.job_store import CLAIM_WINDOW, Claim, JobStore, Outcome
from broker_config.keys import Priority
from broker_config.messages import SCHEMA_VERSION, DecodeRequest, DecodeResult, JobStatus, Mode, Output
from broker_config.settings import Settings, load_settings
from tests.conftest import need_tool
from tests.support.broker_contents import assert_same, everything
from tests.support.keys_left import assert_no_stray_keys
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

#: A lease long enough that none ends by itself, and one that ends while a test waits for it.
LONG_S: Final = 60.0
SHORT_S: Final = 0.1
#: No pause between two looks at the leases counts as an outage.
NO_OUTAGE_S: Final = 3600.0
PX: Final = 64 * 64

_names = itertools.count()


# Given ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bundled", "redis-server"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, broker_server: EmbeddedBroker
) -> Iterator[EmbeddedBroker]:
    """The session's broker, and a plain redis-server."""
    if request.param == "bundled":
        yield broker_server
        return
    binary = Path(need_tool("redis-server"))
    folder = tmp_path_factory.mktemp("redis")
    with EmbeddedBroker(folder, binary=binary, max_memory_bytes=512 * 1024 * 1024) as plain:
        yield plain


@pytest.fixture
def broker_url(server: EmbeddedBroker) -> Iterator[str]:
    """URL of an empty broker; afterwards it must hold no stray key."""
    with redis.Redis.from_url(server.url) as admin:
        admin.flushall()
        yield server.url
        assert_no_stray_keys(admin)


@pytest.fixture
def settings(broker_url: str) -> Settings:
    """Leases that do not end by themselves."""
    return load_settings(redis_url=broker_url, lease_s=LONG_S, lease_renew_s=1.0, _env_file=None)


@dataclass
class Queue:
    """The broker of a test, with what a test does to it."""

    connections: Connections
    settings: Settings
    #: Typed loosely: redis-py says of every answer that it might be text.
    admin: Any

    def store(self, **overrides: Any) -> JobStore:
        """The state machine under other settings."""
        return JobStore(self.connections, self.settings.model_copy(update=overrides))

    def worker(self, name: str = "worker-a", *vaes: str, **overrides: Any) -> StoreWorker:
        """A worker of these VAEs (sd), under other settings."""
        return StoreWorker(self.store(**overrides), name=name, vaes=vaes or ("sd",))

    def request(self, job_id: str = "", *, latents: bytes = b"latents", **fields: Any) -> DecodeRequest:
        """A request whose latents are stored provisionally."""
        job_id = job_id or f"job-{next(_names)}"
        blobs = RedisBlobStore(self.connections, provisional_s=900.0)
        wanted: dict[str, Any] = {
            "job_id": job_id,
            "vae": "sd",
            "layout": "unpacked",
            "latents": blobs.put(f"{job_id}.in", latents),
            "shape": (1, 4, 8, 8),
            "dtype": "float32",
            "height": 64,
            "width": 64,
            "batch": 1,
            "num_frames": 1,
            "fps": 8.0,
            "output": Output.PNG,
        }
        return DecodeRequest(**wanted | fields)

    def submit(self, job_id: str = "", *, store: JobStore | None = None, **fields: Any) -> str:
        """Submits a job; returns its id."""
        request = self.request(job_id, **fields)
        assert (store or self.store()).submit(request)
        return request.job_id

    def submit_many(self, count: int, **fields: Any) -> list[str]:
        """Submits jobs one after the other; returns their ids in order."""
        return [self.submit(**fields) for _ in range(count)]

    def waiting(self, vae: str = "sd", priority: str = "normal") -> list[str]:
        """Ids in a queue, next first."""
        return [item.decode() for item in self.admin.lrange(keys.rq_queue(keys.queue_name(vae, priority)), 0, -1)]

    def state(self, job_id: str) -> JobStatus:
        """Where the job is."""
        return self.store().snapshot(job_id).status

    def totals(self) -> dict[str, int]:
        """What admission counts."""
        return {name.decode(): int(value) for name, value in self.admin.hgetall(keys.TOTALS).items()}

    def reap(self, store: JobStore | None = None) -> dict[str, str]:
        """Waits until leases end; returns what became of their jobs."""
        looking = store or self.store(lease_s=SHORT_S)
        found = wait_until(lambda: looking.reap("janitor", quiet_s=NO_OUTAGE_S).jobs, what="a lease to end")
        return dict(found)

    def wait_ms(self, milliseconds: float) -> None:
        """Until the broker's clock has gone on by this much."""
        until = self.store().now_ms() + milliseconds
        wait_until(lambda: self.store().now_ms() > until, what="the broker's clock")

    @contextmanager
    def max_memory(self, size_bytes: int) -> Iterator[None]:
        """Inside the block the broker may use this much memory."""
        before = self.admin.config_get("maxmemory")["maxmemory"]
        self.admin.config_set("maxmemory", size_bytes)
        try:
            yield
        finally:
            self.admin.config_set("maxmemory", before)


@pytest.fixture
def queue(connections: Connections, settings: Settings, broker_url: str) -> Iterator[Queue]:
    """The broker and what a test does to it."""
    with redis.Redis.from_url(broker_url) as admin:
        yield Queue(connections, settings, admin)


def ids(claims: list[Claim]) -> list[str]:
    """Which jobs were claimed, in order."""
    return [claim.job_id for claim in claims]


# Claim: in which order -----------------------------------------------------------------------------------------


def test_the_oldest_job_of_a_queue_is_claimed_first(queue: Queue) -> None:
    jobs = queue.submit_many(3)
    worker = queue.worker()
    assert [worker.claim_one().job_id for _ in jobs] == jobs
    assert worker.claim() == []


def test_a_claim_holds_what_the_worker_needs_and_the_job_shows_that_it_runs(queue: Queue) -> None:
    job = queue.submit()
    claim = queue.worker("worker-a").claim(token="first")[0]
    assert (claim.job_id, claim.execution, claim.attempt, claim.crashes) == (job, "first", 1, 0)
    assert StoreWorker.request(claim).job_id == job
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.worker, snapshot.attempts) == (JobStatus.PROCESSING, "worker-a", 1)
    assert snapshot.started_ms >= snapshot.submitted_ms > 0
    lease_ms = queue.admin.zscore(keys.LEASES, job) - snapshot.started_ms
    assert lease_ms == LONG_S * 1000


def test_a_higher_priority_is_claimed_first(queue: Queue) -> None:
    low, normal, high = (queue.submit(priority=priority) for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH))
    worker = queue.worker()
    assert [worker.claim_one().job_id for _ in range(3)] == [high, normal, low]


def test_a_job_that_waited_long_enough_is_claimed_before_a_higher_priority(queue: Queue) -> None:
    low = queue.submit(priority=Priority.LOW)
    queue.wait_ms(50)
    high = queue.submit(priority=Priority.HIGH)
    assert queue.worker("patient", ageing_s=60.0).claim_one().job_id == high
    high = queue.submit(priority=Priority.HIGH)
    assert queue.worker("ageing", ageing_s=0.05).claim_one().job_id == low
    assert queue.waiting(priority="high") == [high]


def test_of_two_jobs_that_waited_long_enough_the_older_one_is_claimed_first(queue: Queue) -> None:
    low = queue.submit(priority=Priority.LOW)
    queue.wait_ms(2)
    high = queue.submit(priority=Priority.HIGH)
    queue.wait_ms(50)
    worker = queue.worker("ageing", ageing_s=0.02)
    assert [worker.claim_one().job_id for _ in range(2)] == [low, high]


def test_of_several_vaes_the_oldest_job_of_the_highest_priority_is_claimed_first(queue: Queue) -> None:
    expected = {}
    for name, vae, priority in (
        ("third", "flux", Priority.NORMAL),
        ("first", "sd", Priority.HIGH),
        ("second", "flux", Priority.HIGH),
        ("other", "sdxl", Priority.HIGH),
    ):
        expected[name] = queue.submit(vae=vae, priority=priority)
        queue.wait_ms(1)
    worker = queue.worker("worker-a", "flux", "sd")
    assert [worker.claim_one().job_id for _ in range(3)] == [expected[name] for name in ("first", "second", "third")]
    assert worker.claim() == []
    assert queue.waiting("sdxl", "high") == [expected["other"]]


def test_a_paused_vae_is_not_claimed_from_and_goes_on_when_resumed(queue: Queue) -> None:
    job, other = queue.submit(), queue.submit(vae="flux")
    queue.admin.sadd(keys.PAUSED, "sd")
    worker = queue.worker("worker-a", "sd", "flux")
    assert ids(worker.claim()) == [other]
    assert worker.claim() == []
    queue.admin.srem(keys.PAUSED, "sd")
    assert ids(worker.claim()) == [job]


def test_nothing_is_claimed_while_rq_is_suspended_but_a_replayed_claim_keeps_its_answer(queue: Queue) -> None:
    jobs = queue.submit_many(2)
    worker = queue.worker()
    first = worker.claim(token="before")
    queue.admin.set("rq:suspended", 1, ex=60)
    assert worker.claim() == []
    assert worker.claim(token="before") == first
    assert queue.waiting() == jobs[1:]
    queue.admin.delete("rq:suspended")
    assert ids(worker.claim()) == jobs[1:]


def test_an_id_that_is_twice_in_the_list_runs_once(queue: Queue) -> None:
    job = queue.submit()
    queue.admin.rpush(keys.rq_queue(keys.queue_name("sd", "normal")), job, job)
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [job]
    assert worker.claim() == []
    assert queue.waiting() == []
    assert queue.store().snapshot(job).attempts == 1


def test_an_id_left_in_the_list_after_its_job_ended_is_dropped(queue: Queue) -> None:
    job, following = queue.submit(), queue.submit()
    worker = queue.worker()
    worker.succeed(worker.claim_one())
    queue.admin.lpush(keys.rq_queue(keys.queue_name("sd", "normal")), job, "never-heard-of")
    assert ids(worker.claim()) == [following]
    assert queue.state(job) is JobStatus.SUCCEEDED


def test_a_submit_rings_the_bell_that_idle_workers_wait_for(queue: Queue) -> None:
    store = queue.store()
    assert not store.wait_for_work(["sd"], timeout_s=0.01)
    queue.submit()
    assert store.wait_for_work(["flux", "sd"])


# Claim: the token ----------------------------------------------------------------------------------------------


def test_the_same_token_gets_the_same_jobs_and_counts_one_attempt(queue: Queue) -> None:
    jobs = queue.submit_many(4)
    worker = queue.worker()
    first = worker.claim(token="t", mode=Mode.FAST, max_jobs=2, max_px=100 * PX)
    assert ids(first) == jobs[:2]
    before = everything(queue.admin)
    assert worker.claim(token="t", mode=Mode.FAST, max_jobs=2, max_px=100 * PX) == first
    assert_same(before, everything(queue.admin))


@pytest.mark.parametrize("how", ["succeeded", "failed", "canceled", "tried again", "handed back", "reaped", "expired"])
def test_a_token_replayed_after_its_job_left_the_attempt_claims_nothing(queue: Queue, how: str) -> None:
    job, other = queue.submit_many(2)
    worker = queue.worker(lease_s=SHORT_S) if how == "reaped" else queue.worker()
    (claim,) = worker.claim(token="t")
    match how:
        case "succeeded":
            worker.succeed(claim)
        case "failed":
            worker.fail(claim)
        case "canceled":
            queue.store().cancel(job)
            queue.store().cancel(job, execution=claim.execution)
        case "tried again":
            worker.fail(claim, retryable=True)
        case "handed back":
            queue.store().release([claim])
        case "reaped":
            assert queue.reap() == {job: "requeued"}
        case "expired":
            worker.succeed(claim)
            queue.store().retire(job)
    before = everything(queue.admin)
    assert worker.claim(token="t") == []
    assert_same(before, everything(queue.admin))
    assert other in queue.waiting()


def test_a_replayed_token_still_gives_the_jobs_that_have_not_ended(queue: Queue) -> None:
    jobs = queue.submit_many(3)
    worker = queue.worker()
    claims = worker.claim(token="t", mode=Mode.FAST, max_jobs=3, max_px=100 * PX)
    worker.succeed(claims[1])
    assert ids(worker.claim(token="t")) == [jobs[0], jobs[2]]


def test_a_copy_of_a_claim_that_is_late_on_its_way_claims_nothing(queue: Queue) -> None:
    jobs = queue.submit_many(3)
    worker = queue.worker()
    worker.claim(token="first")
    second = worker.claim(token="second")
    before = everything(queue.admin)
    assert worker.claim(token="first") == []
    assert worker.claim(token="second") == second
    assert_same(before, everything(queue.admin))
    assert queue.waiting() == jobs[2:]


# Claim: batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker_mode", "job_mode", "together"),
    [
        (Mode.EXACT, None, False),
        (Mode.FAST, None, True),
        (Mode.EXACT, Mode.FAST, True),
        (Mode.FAST, Mode.EXACT, False),
    ],
)
def test_jobs_share_a_batch_in_mode_fast_only_and_the_jobs_own_mode_counts(
    queue: Queue, worker_mode: Mode, job_mode: Mode | None, together: bool
) -> None:
    jobs = queue.submit_many(3, mode=job_mode)
    claims = queue.worker().claim(mode=worker_mode, max_jobs=8, max_px=100 * PX)
    assert ids(claims) == (jobs if together else jobs[:1])


@pytest.mark.parametrize(
    "difference",
    [
        {"height": 128, "shape": (1, 4, 16, 8)},
        {"dtype": "float16"},
        {"output": Output.TENSOR},
        {"scaling_factor": 0.5},
        {"layout": "video_2d"},
        {"mode": Mode.FAST},
    ],
    ids=lambda difference: "-".join(difference),
)
def test_a_batch_holds_jobs_of_one_bucket_and_the_others_keep_their_order(
    queue: Queue, difference: dict[str, Any]
) -> None:
    first, other, second, another = (queue.submit(**fields) for fields in ({}, difference, {}, difference))
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, second]
    assert queue.waiting() == [other, another]
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [other, another]


def test_jobs_of_one_shape_share_a_batch_whatever_picture_format_they_want(queue: Queue) -> None:
    jobs = [queue.submit(output=output) for output in (Output.PNG, Output.WEBP, Output.UINT8)]
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == jobs


@pytest.mark.parametrize(
    ("budget_px", "expected"), [(0, 1), (2 * PX - 1, 1), (2 * PX, 2), (3 * PX + 1, 3), (9 * PX, 5)]
)
def test_a_batch_stays_within_the_pixel_budget(queue: Queue, budget_px: int, expected: int) -> None:
    jobs = queue.submit_many(5)
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=budget_px)) == jobs[:expected]


def test_a_job_beyond_the_pixel_budget_still_runs_alone(queue: Queue) -> None:
    large, small = queue.submit(batch=4), queue.submit()
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=PX)) == [large]
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=PX)) == [small]


def test_a_batch_holds_no_more_jobs_than_asked_for(queue: Queue) -> None:
    jobs = queue.submit_many(5)
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=3, max_px=100 * PX)) == jobs[:3]


def test_a_batch_looks_no_further_than_the_window(queue: Queue) -> None:
    first = queue.submit()
    between = queue.submit_many(CLAIM_WINDOW - 1, dtype="float16")
    inside, beyond = queue.submit_many(2)
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, inside]
    assert queue.waiting() == [*between, beyond]


def test_a_job_that_was_on_the_device_of_a_dead_worker_runs_alone(queue: Queue) -> None:
    dies = queue.worker("dies", lease_s=SHORT_S)
    crashed = queue.submit()
    dies.renew(*dies.claim(), stage="device")
    assert queue.reap() == {crashed: "crashed"}
    others = queue.submit_many(2)
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [crashed]
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == others


def test_a_job_that_was_on_the_device_of_a_dead_worker_is_not_taken_along(queue: Queue) -> None:
    dies = queue.worker("dies", lease_s=SHORT_S)
    first, crashed, last = queue.submit_many(3)
    dies.renew(*dies.claim(token="batch", mode=Mode.FAST, max_jobs=2, max_px=100 * PX)[1:], stage="device")
    assert queue.reap() == {first: "requeued", crashed: "crashed"}
    queue_key = keys.rq_queue(keys.queue_name("sd", "normal"))
    queue.admin.delete(queue_key)
    queue.admin.rpush(queue_key, first, crashed, last)
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, last]


# Claim: jobs that must not start -------------------------------------------------------------------------------


def test_a_message_that_needs_a_newer_worker_is_parked_and_never_failed(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer, job = queue.submit(schema_version=SCHEMA_VERSION + 1), queue.submit()
    worker = queue.worker()
    assert ids(worker.claim()) == [job]
    assert worker.claim() == []
    snapshot = queue.store().snapshot(newer)
    assert (snapshot.status, snapshot.error_count, snapshot.attempts) == (JobStatus.QUEUED, 0, 0)
    assert queue.admin.zscore(keys.PARKED, newer) == SCHEMA_VERSION + 1
    assert queue.store().unpark() == 0
    monkeypatch.setattr(job_store, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert queue.store().unpark() == 1
    assert queue.store().unpark() == 0
    assert ids(worker.claim()) == [newer]
    assert queue.admin.zcard(keys.PARKED) == 0


def test_parked_jobs_come_back_first_and_in_their_order(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    for job in ("a", "b", "c"):
        queue.submit(job, schema_version=SCHEMA_VERSION + 1)
    assert queue.worker().claim() == []
    queue.submit("d")
    monkeypatch.setattr(job_store, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert queue.store().unpark() == 3
    assert queue.waiting() == ["a", "b", "c", "d"]


def test_a_message_that_needs_a_newer_worker_is_not_taken_along_in_a_batch(queue: Queue) -> None:
    first, newer, last = queue.submit(), queue.submit(schema_version=SCHEMA_VERSION + 1), queue.submit()
    assert ids(queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, last]
    assert queue.waiting() == [newer]


def test_a_parked_job_can_be_canceled(queue: Queue) -> None:
    job = queue.submit(schema_version=SCHEMA_VERSION + 1)
    assert queue.worker().claim() == []
    assert queue.store().cancel(job) == "canceled"
    assert queue.admin.zcard(keys.PARKED) == 0


def test_a_job_whose_start_deadline_passed_fails_with_its_own_code(queue: Queue) -> None:
    late, job = queue.submit(start_within_s=0.05), queue.submit()
    queue.wait_ms(60)
    assert ids(queue.worker().claim()) == [job]
    snapshot = queue.store().snapshot(late)
    assert snapshot.status is JobStatus.FAILED
    assert [error["code"] for error in snapshot.errors] == [StartDeadlinePassed.code]
    assert (snapshot.error_count, snapshot.attempts) == (1, 0)


def test_a_job_whose_start_deadline_passed_is_not_taken_along_in_a_batch(queue: Queue) -> None:
    first, late, last = queue.submit(), queue.submit(start_within_s=0.05), queue.submit()
    queue.wait_ms(60)
    worker = queue.worker()
    assert ids(worker.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [first, last]
    assert worker.claim() == []
    assert queue.state(late) is JobStatus.FAILED


def test_a_start_deadline_ends_a_job_that_no_worker_looks_at(queue: Queue) -> None:
    first, late, started = queue.submit(), queue.submit(start_within_s=0.05), queue.submit(start_within_s=0.2)
    worker = queue.worker()
    assert ids(worker.claim()) == [first]
    assert queue.store().overdue() == []
    queue.wait_ms(60)
    assert queue.store().overdue() == [late]
    snapshot = queue.store().snapshot(late)
    assert (snapshot.status, [error["code"] for error in snapshot.errors]) == (
        JobStatus.FAILED,
        [StartDeadlinePassed.code],
    )
    assert ids(worker.claim()) == [started]
    queue.wait_ms(210)
    assert queue.store().overdue() == []
    assert queue.state(started) is JobStatus.PROCESSING
    assert queue.admin.zcard(keys.DEADLINES) == 0


def test_each_vae_has_a_pixel_budget_of_its_own(queue: Queue) -> None:
    jobs = {vae: [queue.submit(vae=vae) for _ in range(3)] for vae in ("sd", "flux")}
    worker = queue.worker("worker-a", "sd", "flux")
    budget_px = {"sd": 2 * PX, "flux": 3 * PX}
    claimed = [
        ids(
            queue.store().claim(
                token=f"t{number}",
                worker=worker.name,
                vaes=worker.vaes,
                default_mode=Mode.FAST,
                max_jobs=8,
                max_px=budget_px,
            )
        )
        for number in range(3)
    ]
    assert claimed == [jobs["sd"][:2], jobs["sd"][2:], jobs["flux"]]


def test_a_job_that_ran_out_of_memory_is_tried_by_another_worker(queue: Queue) -> None:
    job, behind = queue.submit(), queue.submit()
    small, large = queue.worker("small"), queue.worker("large")
    for worker in (small, large):
        queue.store().serve(worker.name, ["sd"], ttl_s=60, report={})
    assert small.fail(small.claim_one(), retryable=True, elsewhere=True) is Outcome.RETRYING
    assert ids(small.claim(mode=Mode.FAST, max_jobs=8, max_px=100 * PX)) == [behind]
    assert small.claim() == []
    assert ids(large.claim()) == [job]


def test_a_job_that_ran_out_of_memory_is_tried_again_where_nobody_else_serves(queue: Queue) -> None:
    job = queue.submit()
    small = queue.worker("small")
    queue.store().serve(small.name, ["sd"], ttl_s=60, report={})
    queue.store().serve("other", ["flux"], ttl_s=60, report={})
    queue.store().serve("gone", ["sd"], ttl_s=0.01, report={})
    small.fail(small.claim_one(), retryable=True, elsewhere=True)
    queue.wait_ms(20)
    assert ids(small.claim()) == [job]


def test_a_start_deadline_is_for_the_first_attempt_only(queue: Queue) -> None:
    job = queue.submit(start_within_s=0.2)
    worker = queue.worker()
    worker.fail(worker.claim_one(), retryable=True)
    queue.wait_ms(210)
    assert ids(worker.claim()) == [job]


def test_any_number_of_jobs_that_must_not_start_do_not_hide_the_one_that_may(queue: Queue) -> None:
    late = queue.submit_many(250, start_within_s=0.001)
    queue.wait_ms(2)
    job = queue.submit()
    worker, store = queue.worker(), queue.store()
    while store.wait_for_work(["sd"], timeout_s=0.01):
        pass
    claims, turns = worker.claim(), 1
    while not claims:
        assert store.wait_for_work(["sd"]), "the bell calls the worker back"
        claims, turns = worker.claim(), turns + 1
    assert ids(claims) == [job]
    assert turns == 3, "a claim ends at most 100 jobs: the broker serves nobody else meanwhile"
    assert {queue.state(item) for item in late} == {JobStatus.FAILED}


# Renew ---------------------------------------------------------------------------------------------------------


def test_a_renewal_moves_the_lease_and_tells_stage_and_progress(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    before = queue.admin.zscore(keys.LEASES, job)
    queue.wait_ms(5)
    assert worker.renew(claim, stage="device", done=3, total=9) == ["renewed"]
    assert queue.admin.zscore(keys.LEASES, job) > before
    snapshot = queue.store().snapshot(job)
    assert (snapshot.progress_done, snapshot.progress_total) == (3, 9)
    assert queue.admin.hget(keys.job(job), "stage") == b"device"


def test_progress_starts_again_with_the_next_attempt(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    worker.renew(claim, done=3, total=9)
    worker.fail(claim, retryable=True)
    worker.claim_one()
    snapshot = queue.store().snapshot(job)
    assert (snapshot.progress_done, snapshot.progress_total) == (0, 0)


def test_each_renewal_gets_its_own_word(queue: Queue) -> None:
    jobs = queue.submit_many(4)
    dies, worker = queue.worker("cut-off", lease_s=SHORT_S), queue.worker()
    adopted = dies.claim_one()
    assert queue.reap() == {jobs[0]: "requeued"}
    queue.admin.lrem(keys.rq_queue(keys.queue_name("sd", "normal")), 1, jobs[0])
    renewed, canceled, lost = (worker.claim_one() for _ in range(3))
    queue.store().cancel(canceled.job_id)
    worker.succeed(lost)
    assert worker.renew(renewed, adopted, canceled, lost) == ["renewed", "adopted", "cancel", "lost"]


def test_a_job_whose_lease_ended_goes_on_if_nobody_claimed_it(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    worker.renew(claim, done=2, total=4)
    assert queue.reap() == {job: "requeued"}
    assert worker.renew(claim, done=3, total=4) == ["adopted"]
    assert queue.waiting() == []
    assert worker.renew(claim) == ["renewed"]
    assert queue.worker("other").claim() == []
    assert worker.succeed(claim) is Outcome.COMPLETED
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.attempts) == (JobStatus.SUCCEEDED, 1)


@pytest.mark.parametrize("comes_back", ["renews", "completes", "fails"])
def test_an_outage_costs_an_attempt_nothing_that_was_counted_as_a_crash(queue: Queue, comes_back: str) -> None:
    job = queue.submit()
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    worker.renew(claim, stage="device")
    assert queue.reap() == {job: "crashed"}
    assert [error["code"] for error in queue.store().snapshot(job).errors] == ["worker_crashed"]
    match comes_back:
        case "renews":
            assert worker.renew(claim, stage="device") == ["adopted"]
        case "completes":
            assert worker.succeed(claim) is Outcome.COMPLETED
        case "fails":
            assert worker.fail(claim, retryable=True) is Outcome.RETRYING
    snapshot = queue.store().snapshot(job)
    assert snapshot.crash_count == 0
    assert [error["code"] for error in snapshot.errors] == (["decode_failed"] if comes_back == "fails" else [])


def test_a_job_that_someone_else_claimed_is_not_taken_up_again(queue: Queue) -> None:
    job = queue.submit()
    cut_off = queue.worker("cut-off", lease_s=SHORT_S)
    claim = cut_off.claim_one()
    assert queue.reap() == {job: "requeued"}
    assert ids(queue.worker("other").claim()) == [job]
    assert cut_off.renew(claim) == ["lost"]
    assert queue.store().snapshot(job).worker == "other"


# Fencing -------------------------------------------------------------------------------------------------------


def _reclaimed(queue: Queue, claim: Claim) -> None:
    assert ids(queue.worker("other").claim()) == [claim.job_id]


def _done_by_other(queue: Queue, claim: Claim) -> None:
    other = queue.worker("other")
    other.succeed(other.claim_one())


def _failed_by_other(queue: Queue, claim: Claim) -> None:
    other = queue.worker("other")
    other.fail(other.claim_one())


def _canceled_meanwhile(queue: Queue, claim: Claim) -> None:
    queue.store().cancel(claim.job_id)


def _tombstone(queue: Queue, claim: Claim) -> None:
    _done_by_other(queue, claim)
    queue.store().retire(claim.job_id)


def _handed_back(queue: Queue, claim: Claim) -> None:
    other = queue.worker("other")
    queue.store().release(other.claim())


def _tombstone_gone(queue: Queue, claim: Claim) -> None:
    _tombstone(queue, claim)
    queue.admin.delete(keys.job(claim.job_id), keys.attempts(claim.job_id))


def _say(word: str, worker: StoreWorker, claim: Claim, result: DecodeResult) -> object:
    match word:
        case "complete":
            return worker.store.complete(claim, result)
        case "fail":
            return worker.fail(claim, retryable=True)
        case "fail for good":
            return worker.fail(claim, retryable=False)
        case "renew":
            return worker.renew(claim, stage="device", done=1, total=2)
        case "release":
            return worker.store.release([claim])
        case _:
            try:
                return worker.store.cancel(claim.job_id, execution=claim.execution)
            except JobNotFound:
                return JobNotFound


#: What happened since the attempt was cut off, and what its cancel is answered then.
MEANWHILE: Final[dict[Callable[[Queue, Claim], None], object]] = {
    _reclaimed: "lost",
    _done_by_other: "succeeded",
    _failed_by_other: "failed",
    _canceled_meanwhile: "canceled",
    _handed_back: "lost",
    _tombstone: "expired",
    _tombstone_gone: JobNotFound,
}
TOO_LATE: Final = {
    "complete": Outcome.LOST,
    "fail": Outcome.LOST,
    "fail for good": Outcome.LOST,
    "renew": ["lost"],
    "release": 0,
}


@pytest.mark.parametrize("word", [*TOO_LATE, "cancel"])
@pytest.mark.parametrize("meanwhile", MEANWHILE, ids=lambda given: given.__name__.strip("_"))
def test_what_an_attempt_says_too_late_changes_nothing(
    queue: Queue, meanwhile: Callable[[Queue, Claim], None], word: str
) -> None:
    job = queue.submit()
    late = queue.worker("late", lease_s=SHORT_S)
    claim = late.claim_one()
    result = late.result(claim)  # stored, but nobody will own it
    assert queue.reap() == {job: "requeued"}
    meanwhile(queue, claim)
    before = everything(queue.admin)
    assert _say(word, late, claim, result) == TOO_LATE.get(word, MEANWHILE[meanwhile])
    assert_same(before, everything(queue.admin))


def test_a_word_about_a_job_that_never_was_makes_no_key(queue: Queue) -> None:
    claim = Claim(job_id="never", execution="t", message=b"", rq_data=b"", attempt=1, crashes=0)
    worker = queue.worker()
    result = worker.result(claim)
    before = everything(queue.admin)
    assert queue.store().complete(claim, result) is Outcome.LOST
    assert worker.fail(claim, retryable=True) is Outcome.LOST
    assert worker.renew(claim) == ["lost"]
    assert queue.store().release([claim]) == 0
    assert queue.store().retire("never") == 0
    with pytest.raises(JobNotFound):
        queue.store().cancel("never")
    with pytest.raises(JobNotFound):
        queue.store().snapshot("never")
    assert_same(before, everything(queue.admin))


# Complete ------------------------------------------------------------------------------------------------------


def test_completing_again_says_already_and_changes_nothing(queue: Queue) -> None:
    queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    result = worker.result(claim)
    assert queue.store().complete(claim, result) is Outcome.COMPLETED
    before = everything(queue.admin)
    assert queue.store().complete(claim, result) is Outcome.ALREADY
    assert_same(before, everything(queue.admin))


def test_completing_again_says_already_after_the_client_gave_the_result_up(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    result = worker.result(claim)
    queue.store().complete(claim, result)
    queue.store().retire(job)
    before = everything(queue.admin, but={keys.blob(result.artifacts[0].blob.name)})
    assert queue.store().complete(claim, result) is Outcome.ALREADY
    assert_same(before, everything(queue.admin))


def test_a_job_whose_artifact_expired_before_it_was_complete_goes_on_until_it_is_stored_again(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    result = worker.result(claim)
    queue.admin.delete(keys.blob(result.artifacts[0].blob.name))
    before = everything(queue.admin)
    assert queue.store().complete(claim, result) is Outcome.ARTIFACT_MISSING
    assert_same(before, everything(queue.admin))
    assert queue.store().complete(claim, worker.result(claim)) is Outcome.COMPLETED
    assert queue.state(job) is JobStatus.SUCCEEDED


def test_a_cut_off_attempt_may_complete_a_job_that_waits_again(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    assert queue.reap() == {job: "requeued"}
    assert worker.succeed(claim) is Outcome.COMPLETED
    assert queue.waiting() == []
    assert queue.worker("other").claim() == []


# Fail ----------------------------------------------------------------------------------------------------------


def test_a_job_is_tried_again_until_its_errors_are_used_up_and_every_error_is_kept(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(max_errors=3)
    outcomes = [worker.fail(worker.claim_one(), retryable=True) for _ in range(3)]
    assert outcomes == [Outcome.RETRYING, Outcome.RETRYING, Outcome.FAILED]
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.error_count, snapshot.attempts) == (JobStatus.FAILED, 3, 3)
    assert [(error["code"], error["attempt"]) for error in snapshot.errors] == [
        ("decode_failed", 1),
        ("decode_failed", 2),
        ("decode_failed", 3),
    ]
    assert worker.claim() == []


def test_an_error_that_will_not_go_away_ends_the_job_at_once(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker(max_errors=3)
    assert worker.fail(worker.claim_one(), retryable=False) is Outcome.FAILED
    assert queue.state(job) is JobStatus.FAILED


def test_a_job_tried_again_goes_to_the_end_of_its_queue(queue: Queue) -> None:
    first, second = queue.submit_many(2)
    worker = queue.worker()
    worker.fail(worker.claim_one(), retryable=True)
    assert queue.waiting() == [second, first]


@pytest.mark.parametrize("retryable", [True, False])
def test_failing_again_counts_once(queue: Queue, retryable: bool) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    worker.fail(claim, retryable=retryable)
    before = everything(queue.admin)
    assert worker.fail(claim, retryable=retryable) is Outcome.ALREADY
    assert_same(before, everything(queue.admin))
    assert queue.store().snapshot(job).error_count == 1


def test_a_job_that_someone_canceled_is_not_tried_again(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    assert queue.store().cancel(job) == "requested"
    assert worker.fail(claim, retryable=True) is Outcome.CANCELED
    assert queue.state(job) is JobStatus.CANCELED
    assert worker.fail(claim, retryable=True) is Outcome.ALREADY


# Cancel --------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_canceled_at_once_and_canceling_again_says_so(queue: Queue) -> None:
    job = queue.submit()
    assert queue.store().cancel(job) == "canceled"
    assert queue.waiting() == []
    before = everything(queue.admin)
    assert queue.store().cancel(job) == "canceled"
    assert_same(before, everything(queue.admin))


def test_a_running_job_is_canceled_by_its_worker(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    assert queue.store().cancel(job) == "requested"
    assert queue.store().snapshot(job).cancel_requested
    assert worker.renew(claim) == ["cancel"]
    assert queue.store().cancel(job, execution=claim.execution) == "canceled"
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.cancel_requested) == (JobStatus.CANCELED, False)
    assert worker.renew(claim) == ["lost"]
    assert queue.store().cancel(job, execution=claim.execution) == "canceled"


def test_an_ended_job_cannot_be_canceled(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    worker.succeed(worker.claim_one())
    before = everything(queue.admin)
    assert queue.store().cancel(job) == "succeeded"
    assert_same(before, everything(queue.admin))


# Release -------------------------------------------------------------------------------------------------------


def test_released_jobs_are_next_in_their_order_and_unmarked(queue: Queue) -> None:
    jobs = queue.submit_many(5)
    worker = queue.worker()
    claims = worker.claim(mode=Mode.FAST, max_jobs=3, max_px=100 * PX)
    assert queue.store().release(claims) == 3
    assert queue.waiting() == jobs
    for snapshot in queue.store().snapshots(jobs):
        assert (snapshot.attempts, snapshot.error_count, snapshot.crash_count) == (0, 0, 0)
        assert (snapshot.status, snapshot.errors) == (JobStatus.QUEUED, ())
    assert queue.admin.zcard(keys.LEASES) == 0
    assert queue.worker("other").claim_one().attempt == 1


def test_releasing_again_hands_nothing_back_that_runs_elsewhere(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    claims = worker.claim()
    assert queue.store().release(claims) == 1
    before = everything(queue.admin)
    assert queue.store().release(claims) == 0
    assert_same(before, everything(queue.admin))
    assert ids(queue.worker("other").claim()) == [job]
    before = everything(queue.admin)
    assert queue.store().release(claims) == 0
    assert_same(before, everything(queue.admin))


def test_a_released_job_that_someone_canceled_is_canceled(queue: Queue) -> None:
    job = queue.submit()
    claims = queue.worker().claim()
    queue.store().cancel(job)
    assert queue.store().release(claims) == 0
    assert queue.state(job) is JobStatus.CANCELED
    assert queue.waiting() == []


# Reap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["claimed", "fetch", "finish"])
def test_a_job_that_was_not_on_the_device_of_a_dead_worker_goes_back_unmarked_and_first(
    queue: Queue, stage: str
) -> None:
    job, other = queue.submit_many(2)
    dead = queue.worker("dead", lease_s=SHORT_S)
    claim = dead.claim_one()
    if stage != "claimed":
        dead.renew(claim, stage=stage)
    assert queue.reap() == {job: "requeued"}
    assert queue.waiting() == [job, other]
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.crash_count, snapshot.error_count) == (JobStatus.QUEUED, 0, 0)


def test_the_jobs_of_a_dead_workers_batch_go_back_in_their_order(queue: Queue) -> None:
    jobs = [queue.submit(job) for job in ("a", "b", "c", "d")]
    queue.worker("dead", lease_s=SHORT_S).claim(mode=Mode.FAST, max_jobs=3, max_px=100 * PX)
    queue.reap()
    assert queue.waiting() == jobs


def test_a_job_that_kills_its_workers_fails_after_the_crashes_it_may_have(queue: Queue) -> None:
    job = queue.submit()
    store = queue.store(lease_s=SHORT_S, max_crashes=2)
    dead = StoreWorker(store, name="dead")
    outcomes = []
    for _ in range(2):
        dead.renew(dead.claim_one(), stage="device")
        outcomes.append(queue.reap(store)[job])
    assert outcomes == ["crashed", "failed"]
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.crash_count, snapshot.error_count) == (JobStatus.FAILED, 2, 0)
    assert [(error["code"], error["worker"], error["attempt"]) for error in snapshot.errors] == [
        ("worker_crashed", "dead", 1),
        ("worker_crashed", "dead", 2),
    ]


def test_looking_again_counts_no_crash_twice(queue: Queue) -> None:
    job = queue.submit()
    store = queue.store(lease_s=SHORT_S)
    dead = StoreWorker(store, name="dead")
    dead.renew(dead.claim_one(), stage="device")
    assert queue.reap(store) == {job: "crashed"}
    before = everything(queue.admin, but={keys.REAPER})
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs == {}
    assert_same(before, everything(queue.admin, but={keys.REAPER}))


def test_a_job_whose_worker_died_before_it_could_cancel_it_is_canceled(queue: Queue) -> None:
    job = queue.submit()
    queue.worker("dead", lease_s=SHORT_S).claim()
    queue.store().cancel(job)
    assert queue.reap() == {job: "canceled"}
    assert queue.state(job) is JobStatus.CANCELED


def test_a_live_lease_is_left_alone_and_one_look_takes_no_more_than_its_limit(queue: Queue) -> None:
    held = queue.submit()
    living = queue.worker("living").claim_one()
    assert living.job_id == held
    dead = queue.submit_many(3)
    queue.worker("dead", lease_s=SHORT_S).claim(mode=Mode.FAST, max_jobs=3, max_px=100 * PX)
    store = queue.store(lease_s=SHORT_S)
    first = wait_until(lambda: store.reap("janitor", quiet_s=NO_OUTAGE_S, limit=2).jobs)
    assert len(first) == 2
    second = store.reap("janitor", quiet_s=NO_OUTAGE_S, limit=2).jobs
    assert set(first) | set(second) == set(dead)
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs == {}
    assert queue.state(held) is JobStatus.PROCESSING


def _past_grace(store: JobStore) -> None:
    wait_until(lambda: store.reap("janitor", quiet_s=NO_OUTAGE_S).grace_s == 0, what="the grace period to end")


def test_nothing_expires_for_one_lease_after_the_broker_restarted(queue: Queue) -> None:
    store = queue.store(lease_s=SHORT_S)
    _past_grace(store)
    job = queue.submit()
    queue.worker(lease_s=SHORT_S).claim()
    queue.wait_ms(SHORT_S * 1000 + 1)
    queue.admin.hset(keys.REAPER, "run_id", "the broker before it restarted")
    looked = store.reap("janitor", quiet_s=NO_OUTAGE_S)
    assert looked.jobs == {}
    assert looked.grace_s == SHORT_S
    assert 0 < store.reap("janitor", quiet_s=NO_OUTAGE_S).grace_s <= SHORT_S
    assert queue.state(job) is JobStatus.PROCESSING
    assert queue.reap(store) == {job: "requeued"}


def test_nothing_expires_for_one_lease_after_nobody_looked_for_a_while(queue: Queue) -> None:
    store = queue.store(lease_s=SHORT_S)
    _past_grace(store)
    job = queue.submit()
    queue.worker(lease_s=SHORT_S).claim()
    queue.wait_ms(SHORT_S * 1000 + 1)
    looked = store.reap("another janitor", quiet_s=SHORT_S)
    assert (looked.jobs, looked.grace_s) == ({}, SHORT_S)
    assert queue.reap(store) == {job: "requeued"}


def test_a_worker_that_renews_in_the_grace_period_keeps_its_job(queue: Queue) -> None:
    store = queue.store(lease_s=SHORT_S)
    job = queue.submit()
    claim = queue.worker("cut-off", lease_s=SHORT_S).claim_one()
    queue.wait_ms(SHORT_S * 1000 + 1)
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).grace_s > 0
    assert queue.worker("cut-off").renew(claim) == ["renewed"]
    _past_grace(store)
    assert store.reap("janitor", quiet_s=NO_OUTAGE_S).jobs == {}
    assert queue.state(job) is JobStatus.PROCESSING


# Retention and ownership ---------------------------------------------------------------------------------------


def _again(queue: Queue, source: str, **fields: Any) -> str:
    """Redecodes a job: a new job on the same blob."""
    message = queue.admin.hget(keys.job(source), "message")
    request = replace(DecodeRequest.from_wire(message), job_id=f"again-{next(_names)}", source_job_id=source, **fields)
    assert queue.store().submit(request)
    return request.job_id


def _end(queue: Queue, job: str) -> None:
    worker = queue.worker(f"worker-{next(_names)}")
    claim = worker.claim_one()
    assert claim.job_id == job
    assert worker.succeed(claim) is Outcome.COMPLETED


def test_latents_and_artifacts_stay_as_long_as_the_job_says_after_its_end(queue: Queue) -> None:
    job = queue.submit(retention_s=100.0)
    latents = keys.blob(f"{job}.in")
    assert queue.admin.ttl(latents) == -1
    _end(queue, job)
    ends_ms = queue.store().snapshot(job).expires_ms
    result = queue.store().snapshot(job).result
    assert result is not None
    for key in (latents, keys.blob(result.artifacts[0].blob.name), keys.rq_job(job), keys.rq_results(job)):
        assert abs(queue.admin.pexpiretime(key) - ends_ms) <= 5, key
    tombstone_ms = round(queue.settings.tombstone_s * 1000)
    assert abs(queue.admin.pexpiretime(keys.job(job)) - ends_ms - tombstone_ms) <= 5
    assert ends_ms - queue.store().snapshot(job).ended_ms == 100_000


def test_a_blob_lives_while_a_redecoded_job_needs_it_though_the_first_job_is_gone(queue: Queue) -> None:
    first = queue.submit(latents=b"precious")
    blob = keys.blob(f"{first}.in")
    _end(queue, first)
    assert queue.admin.ttl(blob) > 0
    second = _again(queue, first)
    assert queue.admin.ttl(blob) == -1
    queue.store().retire(first)
    assert queue.state(first) is JobStatus.EXPIRED
    assert queue.admin.get(blob) == b"precious"
    assert queue.admin.ttl(blob) == -1
    _end(queue, second)
    assert queue.admin.ttl(blob) > 0
    queue.store().retire(second)
    assert not queue.admin.exists(blob, keys.owners(f"{first}.in"))


@pytest.mark.parametrize(("first_s", "second_s"), [(50.0, 5000.0), (5000.0, 50.0)])
def test_a_blob_lives_exactly_as_long_as_its_last_owner_needs_it(queue: Queue, first_s: float, second_s: float) -> None:
    first = queue.submit(retention_s=first_s)
    second = _again(queue, first, retention_s=second_s)
    for job in (first, second):
        _end(queue, job)
    snapshots = queue.store().snapshots([first, second])
    blob = keys.blob(f"{first}.in")
    assert abs(queue.admin.pexpiretime(blob) - max(item.expires_ms for item in snapshots)) <= 5
    longest, shortest = sorted((first, second), key=lambda job: queue.store().snapshot(job).expires_ms, reverse=True)
    queue.store().retire(longest)
    left = queue.store().snapshot(shortest).expires_ms
    assert abs(queue.admin.pexpiretime(blob) - left) <= 5
    queue.store().retire(shortest)
    assert not queue.admin.exists(blob)


def test_what_is_due_is_retired_and_only_a_tombstone_is_left(queue: Queue) -> None:
    due, kept = queue.submit(retention_s=0.05), queue.submit()
    for job in (due, kept):
        _end(queue, job)
    assert wait_until(queue.store().retire) == 1
    snapshot = queue.store().snapshot(due)
    assert (snapshot.status, snapshot.request, snapshot.result) == (JobStatus.EXPIRED, None, None)
    assert queue.admin.hget(keys.job(due), "outcome") == b"succeeded"
    assert 0 < queue.admin.ttl(keys.job(due)) <= queue.settings.tombstone_s
    left = {key.decode() for key in queue.admin.scan_iter() if due in key.decode()}
    assert left == {keys.job(due)}
    for kind in ("finished", "failed", "canceled"):
        assert queue.admin.zscore(keys.rq_registry(kind, keys.queue_name("sd", "normal")), due) is None
    assert queue.state(kept) is JobStatus.SUCCEEDED


def test_a_job_past_its_retention_says_expired_before_anyone_came_by(queue: Queue) -> None:
    job = queue.submit(retention_s=0.05)
    _end(queue, job)
    queue.wait_ms(60)
    assert queue.state(job) is JobStatus.EXPIRED
    with pytest.raises(BlobMissing):
        _again(queue, job)


def test_retiring_again_changes_nothing(queue: Queue) -> None:
    job = queue.submit()
    _end(queue, job)
    assert queue.store().retire(job) == 1
    before = everything(queue.admin)
    assert queue.store().retire(job) == 0
    assert_same(before, everything(queue.admin))


@pytest.mark.parametrize("running", [False, True])
def test_a_live_job_cannot_be_retired(queue: Queue, running: bool) -> None:
    job = queue.submit()
    if running:
        queue.worker().claim()
    before = everything(queue.admin)
    assert queue.store().retire(job) == 0
    assert_same(before, everything(queue.admin))


# Admission -----------------------------------------------------------------------------------------------------


def _refused(queue: Queue, store: JobStore, request: DecodeRequest) -> QueueFull:
    with pytest.raises(QueueFull) as caught:
        store.submit(request)
    assert caught.value.job_id == request.job_id
    assert caught.value.retry_after_s > 0
    return caught.value


def _nothing_of(queue: Queue, request: DecodeRequest) -> None:
    """A refused job left nothing but its latents, and those for ten seconds."""
    left = {key.decode() for key in queue.admin.scan_iter() if request.job_id in key.decode()}
    assert left <= {keys.blob(request.latents.name)}
    assert 0 < queue.admin.pttl(keys.blob(request.latents.name)) <= 10_000
    assert request.job_id not in queue.waiting()


def test_no_more_jobs_are_accepted_than_may_be_pending(queue: Queue) -> None:
    store = queue.store(max_pending_jobs=2)
    first, _ = queue.submit_many(2, store=store)
    refused = queue.request()
    totals = queue.totals()
    assert "2 jobs are pending" in _refused(queue, store, refused).message
    _nothing_of(queue, refused)
    assert queue.totals() == totals
    worker = queue.worker()
    assert worker.claim_one().job_id == first
    _refused(queue, store, refused)
    queue.store().cancel(queue.waiting()[0])
    assert store.submit(refused)
    assert queue.admin.ttl(keys.blob(refused.latents.name)) == -1


def test_no_more_latents_are_accepted_than_may_be_pending(queue: Queue) -> None:
    store = queue.store(max_pending_bytes=100)
    queue.submit(store=store, latents=b"x" * 60)
    refused = queue.request(latents=b"x" * 41)
    assert "100 bytes" in _refused(queue, store, refused).message
    _nothing_of(queue, refused)
    queue.submit(store=store, latents=b"x" * 40)


def test_nothing_is_accepted_that_would_fill_the_broker_to_its_watermark_once_decoded(queue: Queue) -> None:
    store = queue.store(memory_watermark=0.5)
    small = queue.request(output=Output.PNG)
    large = queue.request(height=10_000, width=10_000, output=Output.TENSOR)
    expected_bytes = 10_000 * 10_000 * 12
    used_bytes = int(queue.admin.info("memory")["used_memory"])
    with queue.max_memory(2 * (used_bytes + expected_bytes // 2)):
        assert "50%" in _refused(queue, store, large).message
        _nothing_of(queue, large)
        assert store.submit(small)
    with queue.max_memory(2 * (used_bytes + expected_bytes + 10_000_000)):
        assert store.submit(queue.request(large.job_id, height=10_000, width=10_000, output=Output.TENSOR))
        _refused(queue, store, queue.request(height=10_000, width=10_000, output=Output.TENSOR))


def test_a_refused_redecode_leaves_the_latents_of_its_source_alone(queue: Queue) -> None:
    job = queue.submit()
    before = everything(queue.admin)
    message = queue.admin.hget(keys.job(job), "message")
    request = replace(DecodeRequest.from_wire(message), job_id="again", source_job_id=job)
    _refused(queue, queue.store(max_pending_jobs=1), request)
    assert_same(before, everything(queue.admin))


def test_a_replay_is_answered_though_the_queue_is_full(queue: Queue) -> None:
    store = queue.store(max_pending_jobs=1)
    request = queue.request()
    assert store.submit(request)
    assert not store.submit(request)
    with pytest.raises(JobConflict):
        store.submit(replace(request, output=Output.WEBP))


# Totals --------------------------------------------------------------------------------------------------------


def _by_success(queue: Queue) -> JobStatus:
    worker = queue.worker()
    worker.succeed(worker.claim_one())
    return JobStatus.SUCCEEDED


def _by_error(queue: Queue) -> JobStatus:
    worker = queue.worker()
    worker.fail(worker.claim_one())
    return JobStatus.FAILED


def _by_errors(queue: Queue) -> JobStatus:
    worker = queue.worker(max_errors=2)
    worker.fail(worker.claim_one(), retryable=True)
    worker.fail(worker.claim_one(), retryable=True)
    return JobStatus.FAILED


def _by_error_of_a_cut_off_attempt(queue: Queue) -> JobStatus:
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    queue.reap()
    worker.fail(claim)
    return JobStatus.FAILED


def _by_success_of_a_cut_off_attempt(queue: Queue) -> JobStatus:
    worker = queue.worker(lease_s=SHORT_S)
    claim = worker.claim_one()
    queue.reap()
    worker.succeed(claim)
    return JobStatus.SUCCEEDED


def _by_crash(queue: Queue) -> JobStatus:
    store = queue.store(lease_s=SHORT_S, max_crashes=1)
    worker = StoreWorker(store)
    worker.renew(worker.claim_one(), stage="device")
    queue.reap(store)
    return JobStatus.FAILED


def _by_cancel_while_queued(queue: Queue) -> JobStatus:
    queue.store().cancel(queue.waiting()[0])
    return JobStatus.CANCELED


def _by_cancel_while_running(queue: Queue) -> JobStatus:
    claim = queue.worker().claim_one()
    queue.store().cancel(claim.job_id)
    queue.store().cancel(claim.job_id, execution=claim.execution)
    return JobStatus.CANCELED


def _by_cancel_of_a_dead_workers_job(queue: Queue) -> JobStatus:
    claim = queue.worker(lease_s=SHORT_S).claim_one()
    queue.store().cancel(claim.job_id)
    queue.reap()
    return JobStatus.CANCELED


def _by_cancel_of_a_job_handed_back(queue: Queue) -> JobStatus:
    claim = queue.worker().claim_one()
    queue.store().cancel(claim.job_id)
    queue.store().release([claim])
    return JobStatus.CANCELED


def _by_deadline(queue: Queue) -> JobStatus:
    (job,) = queue.waiting()
    queue.admin.hset(keys.job(job), "deadline_ms", 1)
    assert queue.worker().claim() == []
    return JobStatus.FAILED


WAYS_TO_END: Final = [
    _by_success,
    _by_success_of_a_cut_off_attempt,
    _by_error,
    _by_errors,
    _by_error_of_a_cut_off_attempt,
    _by_crash,
    _by_cancel_while_queued,
    _by_cancel_while_running,
    _by_cancel_of_a_dead_workers_job,
    _by_cancel_of_a_job_handed_back,
    _by_deadline,
]


@pytest.mark.parametrize("end", WAYS_TO_END, ids=lambda end: end.__name__.strip("_"))
def test_what_admission_counts_is_given_back_however_a_job_ends(
    queue: Queue, end: Callable[[Queue], JobStatus]
) -> None:
    job = queue.submit(latents=b"x" * 100)
    assert queue.totals() == {"jobs": 1, "latents_bytes": 100, "reserved_bytes": 2 * PX, "px": PX}
    status = end(queue)
    assert queue.state(job) is status
    assert queue.totals() == {"jobs": 0, "latents_bytes": 0, "reserved_bytes": 0, "px": 0}
    assert queue.waiting() == []
    assert queue.admin.zcard(keys.LEASES) == 0
    assert queue.admin.zscore(keys.RETENTION, job) == queue.store().snapshot(job).expires_ms
    assert queue.admin.zcard(keys.rq_registry("wip", keys.queue_name("sd", "normal"))) == 0
    assert [key for key in queue.admin.scan_iter("rq:execution*")] == []
    assert queue.admin.xlen(keys.rq_results(job)) == 1
    queue.store().retire(job)
    assert queue.totals() == {"jobs": 0, "latents_bytes": 0, "reserved_bytes": 0, "px": 0}
    assert {key.decode() for key in queue.admin.scan_iter(f"*{job}*")} <= {keys.job(job), keys.attempts(job)}


# A broker that is full -----------------------------------------------------------------------------------------


def test_a_full_broker_refuses_new_jobs_and_keeps_nothing_of_them(queue: Queue) -> None:
    stored = queue.request()
    before = everything(queue.admin, but={keys.blob(stored.latents.name)})
    with queue.max_memory(1):
        with pytest.raises((BrokerRefusesWrites, QueueFull)):
            queue.request()
        with pytest.raises(QueueFull):
            queue.store().submit(stored)
    assert_same(before, everything(queue.admin, but={keys.blob(stored.latents.name)}))
    assert queue.admin.ttl(keys.blob(stored.latents.name)) > 0


def test_a_full_broker_still_takes_everything_a_worker_and_a_janitor_say(queue: Queue) -> None:
    jobs = queue.submit_many(8)
    worker, dead = queue.worker(), queue.worker("dead", lease_s=SHORT_S)
    completes, fails, retries, releases, cancels = (worker.claim_one() for _ in range(5))
    result = worker.result(completes)
    dead.renew(dead.claim_one(), stage="device")
    store = queue.store()
    with queue.max_memory(1):
        assert worker.renew(completes, fails, stage="device", done=1, total=2) == ["renewed", "renewed"]
        assert store.complete(completes, result) is Outcome.COMPLETED
        assert worker.fail(fails) is Outcome.FAILED
        assert worker.fail(retries, retryable=True) is Outcome.RETRYING
        assert store.release([releases]) == 1
        assert store.cancel(cancels.job_id) == "requested"
        assert store.cancel(cancels.job_id, execution=cancels.execution) == "canceled"
        assert queue.reap() == {jobs[5]: "crashed"}
        assert store.cancel(jobs[7]) == "canceled"
        assert worker.claim_one().job_id == jobs[5]
        store.serve("worker-a", ["sd"], ttl_s=5, report={})
        assert store.retire(completes.job_id) == 1
        assert store.lead("janitor", ttl_s=1)
        assert store.unpark() == 0
        assert store.audit(jobs, settle_s=3600) == {}
    assert [queue.state(job) for job in jobs] == [
        JobStatus.EXPIRED,
        JobStatus.FAILED,
        JobStatus.QUEUED,
        JobStatus.QUEUED,
        JobStatus.CANCELED,
        JobStatus.PROCESSING,
        JobStatus.QUEUED,
        JobStatus.CANCELED,
    ]


# Times ---------------------------------------------------------------------------------------------------------


def test_the_scripts_write_times_as_rq_does(queue: Queue) -> None:
    days = [
        datetime(year, month, day, tzinfo=UTC)
        for year in (1970, 1999, 2000, 2023, 2024, 2025, 2026, 2096, 2100)
        for month, day in ((1, 1), (2, 28), (3, 1), (6, 30), (12, 31))
    ]
    days += [datetime(year, 2, 29, tzinfo=UTC) for year in (1972, 2000, 2024, 2028, 2096)]
    offsets = [timedelta(0), timedelta(milliseconds=1), timedelta(hours=23, minutes=59, seconds=59, milliseconds=999)]
    moments = [day + offset for day in days for offset in offsets]
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    moments += [epoch + timedelta(milliseconds=ms) for ms in range(0, 4_200_000_000_000, 1_234_567_891)]
    written = _lua(
        queue,
        "local out = {} for i, ms in ipairs(ARGV) do out[i] = utc(tonumber(ms)) end return out",
        *((moment - epoch) // timedelta(milliseconds=1) for moment in moments),
    )
    assert [text.decode() for text in written] == [utcformat(moment) for moment in moments]


def _lua(queue: Queue, body: str, *args: Any) -> Any:
    """Runs a line of Lua behind the prelude that all scripts share."""
    prelude = scripts.source("cancel").rpartition("-- ARGV: id, execution")[0]
    return queue.admin.eval(prelude + body, 0, *args)


def test_the_times_of_a_job_are_those_of_the_brokers_clock(queue: Queue) -> None:
    before = queue.store().now_ms()
    job = queue.submit()
    _end(queue, job)
    after = queue.store().now_ms()
    snapshot = queue.store().snapshot(job)
    assert before <= snapshot.submitted_ms <= snapshot.started_ms <= snapshot.ended_ms <= after
    (entry,) = queue.admin.xrange(keys.rq_results(job))
    assert json.loads(entry[1][b"execution_ended_at"]) == snapshot.ended_ms / 1000
