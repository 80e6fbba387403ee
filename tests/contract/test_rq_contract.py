"""What we leave in the broker is what stock RQ 3.0 leaves there, but for the differences listed here.

`broker_config/rq_format.py`, `broker_config/scripts` and `worker/rq_adapter.py` write RQ's keys without asking RQ.
Each story below is told twice on a real broker: through `JobStore`, and by a stock `SimpleWorker` with an equivalent
job.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import redis
from rq import Queue, SimpleWorker
from rq.command import send_shutdown_command, send_stop_job_command
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, Retry
from rq.registry import (
    BaseRegistry,
    CanceledJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import utcformat
from rq.worker import BaseWorker, Worker, WorkerStatus

from broker_config import keys
from broker_config.connection import connect_url
from broker_config.job_store import Claim, JobStore, Outcome
from broker_config.messages import DECODE_FUNCTION, JobStatus, Mode
from broker_config.settings import Settings, load_settings
from producer import DecodeClient
from tests.support import rq_functions
from tests.support.broker_contents import assert_same, everything
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until
from worker.rq_adapter import RqPresence

QUEUE: Final = "latentq.sd.normal"
LATENTS: Final = np.zeros((1, 4, 8, 8), dtype=np.float32)
RETENTION_S: Final = 3600
DAY_S: Final = 86_400


# Given ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(broker_url: str) -> Settings:
    """Leases that do not end by themselves; our own catalogue."""
    return load_settings(redis_url=broker_url, lease_s=60.0, lease_renew_s=1.0, max_errors=2, _env_file=None)


@dataclass
class Side:
    """The test's broker, seen through latentq and through RQ."""

    url: str
    settings: Settings
    #: Typed loosely: redis-py says of every answer that it might be text.
    admin: Any
    store: JobStore

    def submit(self, job_id: str) -> Job:
        """Submits through latentq; returns the job as RQ reads it."""
        client = DecodeClient(self.store.connections, settings=self.settings)
        client.submit(LATENTS, vae="sd", job_id=job_id, retention_s=RETENTION_S)
        return self.fetch(job_id)

    def enqueue(self, function: Callable[..., Any], job_id: str, **options: Any) -> Job:
        """Enqueues on our queue with RQ itself."""
        ours: dict[str, Any] = {
            "timeout": 60,
            "result_ttl": RETENTION_S,
            "failure_ttl": RETENTION_S,
            "description": "a job",
        }
        return self.queue.enqueue_call(function, args=[job_id], job_id=job_id, **ours | options)

    def fetch(self, job_id: str) -> Job:
        """The job as RQ reads it."""
        return Job.fetch(job_id, connection=self.admin, serializer=JSONSerializer)

    @property
    def queue(self) -> Queue:
        """The queue as RQ reads it."""
        return Queue(QUEUE, connection=self.admin, serializer=JSONSerializer)

    def registry(self, kind: type[BaseRegistry]) -> BaseRegistry:
        """One of the queue's registries as RQ reads it."""
        return kind(QUEUE, connection=self.admin, serializer=JSONSerializer)

    def listed(self) -> dict[str, list[str]]:
        """Which of the queue's registries hold which jobs, by RQ's reading; without those that are empty."""
        kinds = (StartedJobRegistry, FinishedJobRegistry, FailedJobRegistry, CanceledJobRegistry)
        found = {kind.__name__.removesuffix("JobRegistry"): self.registry(kind).get_job_ids() for kind in kinds}
        return {name: job_ids for name, job_ids in found.items() if job_ids}

    def state(self, job_id: str) -> JobStatus:
        """The job as latentq has it."""
        return self.store.snapshot(job_id).status

    def worker(self, name: str = "worker-a", **overrides: Any) -> StoreWorker:
        """A worker of ours, without device."""
        store = JobStore(self.store.connections, self.settings.model_copy(update=overrides))
        return StoreWorker(store, name=name)

    def stock_worker(self, name: str = "worker-a") -> SimpleWorker:
        """RQ's own worker."""
        return SimpleWorker([self.queue], name=name, connection=self.admin, serializer=JSONSerializer)

    @contextmanager
    def presence(self, **told: Callable[..., None]) -> Iterator[RqPresence]:
        """Our worker as RQ sees it, for the length of the block."""
        presence = RqPresence(
            name="worker-a",
            queues=[QUEUE],
            connection=self.store.connections.commands,
            ttl_s=30,
            on_stop_job=told.get("on_stop_job", lambda job_id: None),
            on_shutdown=told.get("on_shutdown", lambda: None),
        )
        presence.announce()
        try:
            yield presence
        finally:
            presence.leave()

    def rq_info(self) -> list[str]:
        """What `rq info --raw` prints."""
        command = [str(Path(sys.executable).with_name("rq")), "info", "--raw", "--url", self.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.splitlines()


@pytest.fixture
def side(broker_url: str, settings: Settings) -> Iterator[Side]:
    """The test's broker."""
    connections = connect_url(broker_url, name="latentq-test")
    with redis.Redis.from_url(broker_url) as admin:
        yield Side(broker_url, settings, admin, JobStore(connections, settings))
    connections.close()
    rq_functions.during = None
    rq_functions.called.clear()


# What of RQ we call --------------------------------------------------------------------------------------------


def _parameters(function: Callable[..., Any]) -> str:
    return ", ".join(
        str(parameter.replace(annotation=parameter.empty))
        for parameter in inspect.signature(function).parameters.values()
    )


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            Job.create,
            "func, args=None, kwargs=None, connection=None, result_ttl=None, ttl=None, status=None, description=None, "
            "depends_on=None, timeout=None, retry=None, id=None, origin='', meta=None, failure_ttl=None, "
            "serializer=None, group_id=None, on_success=None, on_failure=None, on_stopped=None, webhooks=None",
        ),
        (Job.to_dict, "self, include_meta=True, include_result=True"),
        (
            BaseWorker.__init__,
            "self, queues, name=None, default_result_ttl=500, connection=None, exception_handlers=None, "
            "maintenance_interval=600, default_worker_ttl=None, worker_ttl=None, job_class=None, queue_class=None, "
            "log_job_description=True, job_monitoring_interval=30, disable_default_exception_handler=False, "
            "prepare_for_work=True, serializer=None, work_horse_killed_handler=None",
        ),
        (BaseWorker._set_connection, "self, connection"),
        (BaseWorker.register_birth, "self"),
        (BaseWorker.register_death, "self"),
        (BaseWorker.heartbeat, "self, timeout=None, pipeline=None"),
        (BaseWorker.set_state, "self, state, pipeline=None"),
        (utcformat, "dt"),
        (JSONSerializer.dumps, "*args, **kwargs"),
        (JSONSerializer.loads, "s, *args, **kwargs"),
    ],
    ids=lambda given: getattr(given, "__qualname__", ""),
)
def test_what_we_call_of_rq_takes_what_we_give_it(function: Callable[..., Any], parameters: str) -> None:
    assert _parameters(function) == parameters


def test_what_we_read_of_rq_is_what_it_was(side: Side) -> None:
    assert version("rq").startswith("3.0.")
    assert RQ_KEY_PREFIX == "rq"
    worker = side.stock_worker("w")
    assert (worker.key, worker.pubsub_channel_name, worker.executions_key) == (
        "rq:worker:w",
        "rq:pubsub:w",
        "rq:worker:w:executions",
    )
    assert [state.value for state in WorkerStatus] == ["started", "suspended", "busy", "idle"]
    assert {kind.name: kind.value for kind in Result.Type} == {
        "SUCCESSFUL": 1,
        "FAILED": 2,
        "STOPPED": 3,
        "RETRIED": 4,
        "MAX_RETRIES_EXCEEDED": 5,
    }
    assert JSONSerializer.loads(JSONSerializer.dumps({"a": [1]})) == {"a": [1]}


# The same story, told twice ------------------------------------------------------------------------------------

Facts = set[str]


def facts_of(admin: Any) -> Facts:
    """What RQ's keys hold, a line for each fact, without what differs from run to run (ids of executions, times)."""
    executions = {key.decode().rpartition(":")[2] for key in admin.scan_iter("rq:execution:*")}

    def plain(text: bytes) -> str:
        name = text.decode()
        for execution in executions:
            name = name.replace(execution, "EXECUTION")
        return name

    facts: Facts = set()
    for key in admin.scan_iter("rq:*"):
        kind, name = admin.type(key).decode(), plain(key)
        facts.add(f"{name} is a {kind}{' that expires' if admin.ttl(key) >= 0 else ''}")
        match kind:
            case "hash":
                facts |= {f"{name} has {part.decode()}" for part in admin.hkeys(key)}
                if key.startswith(b"rq:job:"):
                    facts.add(f"{name} is {admin.hget(key, 'status').decode()}")
            case "list":
                facts |= {f"{name} holds {plain(item)}" for item in admin.lrange(key, 0, -1)}
            case "set":
                facts |= {f"{name} holds {plain(item)}" for item in admin.smembers(key)}
            case "zset":
                for member, score in admin.zrange(key, 0, -1, withscores=True):
                    facts.add(f"{name} holds {plain(member)} until {'inf' if score == float('inf') else 'a time'}")
            case "stream":
                for _, entry in admin.xrange(key):
                    facts.add(f"{name} holds a {Result.Type(int(entry[b'type'])).name}")
                    facts |= {f"{name} has {part.decode()}" for part in entry}
    return facts


@dataclass
class Story:
    """What the keys looked like at each moment."""

    side: Side
    seen: dict[str, Facts] = field(default_factory=dict)

    def look(self, moment: str) -> None:
        """Notes the keys as they are."""
        self.seen[moment] = facts_of(self.side.admin)


def _told_by_us(story: Story, end: Callable[[Side, Claim | None], None], *, claimed: bool = True) -> None:
    side = story.side
    side.submit("job")
    story.look("queued")
    with side.presence() as presence:
        claim = None
        if claimed:
            claim = side.worker().claim_one()
            presence.show(busy=True)
            story.look("running")
        end(side, claim)
        presence.show(busy=False)
        story.look("ended")


def _told_by_rq(story: Story, function: Callable[..., Any], *, stop: bool = False, **options: Any) -> None:
    side = story.side
    side.enqueue(function, "job", **options)
    story.look("queued")
    worker = side.stock_worker()
    worker.register_birth()
    worker.set_state(WorkerStatus.IDLE)

    def during(job_id: str) -> None:
        if "running" in story.seen:
            story.look("running again")
        else:
            story.look("running")
        if stop:  # what the worker does when `stop-job` reaches it
            worker._stopped_job_id = job_id

    rq_functions.during = during
    queues = [side.queue]
    while found := Queue.dequeue_any(queues, None, connection=side.admin, serializer=JSONSerializer):
        worker.execute_job(*found)
    story.look("ended")
    worker.register_death()


def _succeed(side: Side, claim: Claim | None) -> None:
    assert claim is not None
    assert side.worker().succeed(claim) is Outcome.COMPLETED


def _fail(side: Side, claim: Claim | None) -> None:
    assert claim is not None
    assert side.worker().fail(claim) is Outcome.FAILED


def _stop(side: Side, claim: Claim | None) -> None:
    assert claim is not None
    assert side.store.cancel("job", execution=claim.execution) == "canceled"


RETRY_FIELDS: Final = "retries are counted in latentq's own record"
NO_STOCK_SWEEP: Final = "no stock sweep may touch it: RQ judges by the clock of whichever host runs `rq info`"
#: Facts that hold on our side (+) or on RQ's (-) only, by moment, with the reason.
RUNNING: Final = {
    "+ rq:wip:latentq.sd.normal holds job:EXECUTION until inf": NO_STOCK_SWEEP,
    "- rq:wip:latentq.sd.normal holds job:EXECUTION until a time": NO_STOCK_SWEEP,
    "+ rq:executions:job holds EXECUTION until inf": NO_STOCK_SWEEP,
    "- rq:executions:job holds EXECUTION until a time": NO_STOCK_SWEEP,
}
WITH_RETRY: Final = {"- rq:job:job has retries_left": RETRY_FIELDS, "- rq:job:job has retry_intervals": RETRY_FIELDS}
JOBS_NOT_ATTEMPTS: Final = "we count jobs that failed, RQ counts attempts"
ONE_CANCELED: Final = "latentq has one state for what someone ended: RQ tells canceled from stopped"
WAKES_WAITERS: Final = "the entry wakes whoever waits for the job; RQ's own cancel wakes nobody"
KEPT_FOR_EVER: Final = "RQ keeps a canceled job for ever; ours goes with its retention"

SUCCESS: Final = {"running": RUNNING}
FAILURE: Final = {"running": RUNNING}
RETRIED: Final = {
    "queued": WITH_RETRY,
    "running": RUNNING | WITH_RETRY,
    "running again": RUNNING
    | WITH_RETRY
    | {
        "- rq:worker:worker-a has failed_job_count": JOBS_NOT_ATTEMPTS,
        "- rq:worker:worker-a has total_working_time": JOBS_NOT_ATTEMPTS,
    },
    "ended": WITH_RETRY | {"- rq:worker:worker-a has failed_job_count": JOBS_NOT_ATTEMPTS},
}
STOPPED: Final = {
    "running": RUNNING,
    "ended": {
        "+ rq:job:job is canceled": ONE_CANCELED,
        "- rq:job:job is stopped": ONE_CANCELED,
        "+ rq:canceled:latentq.sd.normal is a zset": ONE_CANCELED,
        "+ rq:canceled:latentq.sd.normal holds job until a time": ONE_CANCELED,
        "- rq:failed:latentq.sd.normal is a zset": ONE_CANCELED,
        "- rq:failed:latentq.sd.normal holds job until a time": ONE_CANCELED,
        "+ rq:results:job holds a STOPPED": "RQ notes a stopped job as FAILED, with a traceback of its signal",
        "- rq:results:job holds a FAILED": "as above",
        "- rq:results:job has exc_string": "as above",
        "- rq:worker:worker-a has failed_job_count": "a job that someone ended did not fail",
    },
}
CANCELED: Final = {
    "ended": {
        "+ rq:job:job is a hash that expires": KEPT_FOR_EVER,
        "- rq:job:job is a hash": KEPT_FOR_EVER,
        "+ rq:results:job is a stream that expires": WAKES_WAITERS,
        "+ rq:results:job holds a STOPPED": WAKES_WAITERS,
        "+ rq:results:job has type": WAKES_WAITERS,
        "+ rq:results:job has worker_name": WAKES_WAITERS,
    },
}


def _assert_told_alike(ours: Story, stock: Story, differences: dict[str, dict[str, str]]) -> None:
    assert ours.seen.keys() == stock.seen.keys()
    for moment, facts in ours.seen.items():
        found = {f"+ {fact}" for fact in facts - stock.seen[moment]}
        found |= {f"- {fact}" for fact in stock.seen[moment] - facts}
        assert found == set(differences.get(moment, {})), moment


def _tell_twice(
    side: Side, ours: Callable[[Story], None], stock: Callable[[Story], None], differences: dict[str, dict[str, str]]
) -> None:
    told = Story(side)
    ours(told)
    side.admin.flushall()
    again = Story(side)
    stock(again)
    _assert_told_alike(told, again, differences)


def test_a_job_that_succeeds_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    _tell_twice(
        side,
        lambda story: _told_by_us(story, _succeed),
        lambda story: _told_by_rq(story, rq_functions.succeed),
        SUCCESS,
    )


def test_a_job_that_fails_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    _tell_twice(
        side, lambda story: _told_by_us(story, _fail), lambda story: _told_by_rq(story, rq_functions.fail), FAILURE
    )


def test_a_job_that_succeeds_when_tried_again_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    def ours(story: Story) -> None:
        def end(side: Side, claim: Claim | None) -> None:
            assert claim is not None
            worker = side.worker()
            assert worker.fail(claim, retryable=True) is Outcome.RETRYING
            claim = worker.claim_one()
            story.look("running again")
            worker.succeed(claim)

        _told_by_us(story, end)

    _tell_twice(side, ours, lambda story: _told_by_rq(story, rq_functions.fail_first, retry=Retry(max=1)), RETRIED)


def test_a_job_that_is_stopped_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    _tell_twice(
        side,
        lambda story: _told_by_us(story, _stop),
        lambda story: _told_by_rq(story, rq_functions.fail, stop=True),
        STOPPED,
    )


def test_a_job_that_is_canceled_while_queued_looks_to_rq_like_one_of_its_own(side: Side) -> None:
    def cancel(side: Side, claim: Claim | None) -> None:
        assert side.store.cancel("job") == "canceled"

    def stock(story: Story) -> None:
        job = side.enqueue(rq_functions.succeed, "job")
        story.look("queued")
        with side.presence():
            job.cancel()
            story.look("ended")
        job.delete()

    _tell_twice(side, lambda story: _told_by_us(story, cancel, claimed=False), stock, CANCELED)


def test_what_expires_does_so_when_rqs_own_would(side: Side) -> None:
    def times() -> dict[str, float]:
        now = time.time()
        return {
            "job": side.admin.pexpiretime("rq:job:job") / 1000 - now,
            "result": side.admin.pexpiretime("rq:results:job") / 1000 - now,
            "listed": side.admin.zscore("rq:finished:latentq.sd.normal", "job") - now,
        }

    _told_by_us(Story(side), _succeed)
    ours = times()
    side.admin.flushall()
    _told_by_rq(Story(side), rq_functions.succeed)
    stock = times()
    assert ours == pytest.approx(stock, abs=5)
    assert ours == pytest.approx({"job": RETENTION_S, "result": RETENTION_S, "listed": RETENTION_S}, abs=5)


# What RQ's own eyes see ----------------------------------------------------------------------------------------


def test_rq_sees_a_job_wait_run_and_succeed(side: Side) -> None:
    job = side.submit("job")
    assert job.func_name == DECODE_FUNCTION
    assert job.args == ["job"]
    assert (job.get_status(), job.get_position(), job.origin) == ("queued", 0, QUEUE)
    assert (side.queue.count, side.queue.job_ids, side.listed()) == (1, ["job"], {})
    assert job.latest_result() is None
    with side.presence() as presence:
        worker = side.worker()
        claim = worker.claim_one()
        presence.show(busy=True)
        running = side.fetch("job")
        assert (running.get_status(), running.worker_name) == ("started", "worker-a")
        assert running.started_at is not None
        assert running.ended_at is None
        assert [execution.id for execution in running.get_executions()] == [claim.execution]
        assert (side.queue.count, side.listed()) == (0, {"Started": ["job"]})
        (seen,) = Worker.all(connection=side.admin, serializer=JSONSerializer)
        assert (seen.name, seen.get_state(), seen.queue_names()) == ("worker-a", "busy", [QUEUE])
        assert [(item.job_id, item.worker_name) for item in seen.get_current_executions()] == [("job", "worker-a")]
        current = seen.get_current_job()
        assert current is not None
        assert current.id == "job"
        queue_line, worker_line = side.rq_info()
        assert queue_line == "queue latentq.sd.normal 0, 1 executing, 0 finished, 0 failed"
        assert " busy latentq.sd.normal. jobs: 0 finished, 0 failed" in worker_line
        assert side.state("job") is JobStatus.PROCESSING

        name = worker.result(claim).artifacts[0].blob.name
        worker.succeed(claim)
        presence.show(busy=False)
        done = side.fetch("job")
        result = done.latest_result()
        assert result is not None
        assert (result.type, result.return_value) == (Result.Type.SUCCESSFUL, [name])
        assert done.return_value() == [name]
        assert (result.worker_name, result.execution_id) == ("worker-a", claim.execution)
        assert done.ended_at is not None
        assert done.started_at is not None
        assert done.enqueued_at is not None
        assert done.started_at <= done.ended_at
        assert result.execution_ended_at == done.ended_at
        assert (done.get_status(), done.is_finished, side.listed()) == ("finished", True, {"Finished": ["job"]})
        assert done.get_executions() == []
        (seen,) = Worker.all(connection=side.admin, serializer=JSONSerializer)
        assert (seen.get_state(), seen.successful_job_count, seen.failed_job_count) == ("idle", 1, 0)
        assert seen.get_current_executions() == []
        queue_line, worker_line = side.rq_info()
        assert queue_line == "queue latentq.sd.normal 0, 0 executing, 1 finished, 0 failed"
        assert " idle latentq.sd.normal. jobs: 1 finished, 0 failed" in worker_line
    assert Worker.all(connection=side.admin) == []


def test_rq_sees_a_job_fail_with_its_traceback(side: Side) -> None:
    side.submit("job")
    with side.presence():
        worker = side.worker()
        worker.fail(worker.claim_one())
        (seen,) = Worker.all(connection=side.admin, serializer=JSONSerializer)
        assert (seen.successful_job_count, seen.failed_job_count) == (0, 1)
    job = side.fetch("job")
    result = job.latest_result()
    assert result is not None
    assert result.type is Result.Type.FAILED
    assert result.exc_string == "Traceback …\nDecodeFailed: the VAE raised"
    assert (job.get_status(), side.listed()) == ("failed", {"Failed": ["job"]})
    assert side.rq_info()[0] == "queue latentq.sd.normal 0, 0 executing, 0 finished, 1 failed"


def test_rq_sees_a_canceled_job(side: Side) -> None:
    job = side.submit("job")
    side.store.cancel("job")
    assert (job.get_status(), job.is_canceled) == ("canceled", True)
    assert (side.queue.count, side.listed()) == (0, {"Canceled": ["job"]})


def test_rq_sees_several_jobs_of_one_worker_at_once(side: Side) -> None:
    for name in ("one", "two", "three"):
        side.submit(name)
    with side.presence():
        claims = side.worker().claim(mode=Mode.FAST, max_jobs=2, max_px=1 << 30)
        (seen,) = Worker.all(connection=side.admin, serializer=JSONSerializer)
        assert {item.job_id for item in seen.get_current_executions()} == {"one", "two"}
        assert side.listed() == {"Started": ["one", "two"]}
        assert side.queue.job_ids == ["three"]
        side.store.release(claims)
        assert seen.get_current_executions(refresh=True) == []
        assert side.queue.job_ids == ["one", "two", "three"]


def test_a_blocking_read_of_rqs_result_wakes_when_the_job_ends(side: Side) -> None:
    job = side.submit("job")
    worker = side.worker()
    worker.succeed(worker.claim_one())
    result = job.latest_result(timeout=1)
    assert result is not None
    assert result.type is Result.Type.SUCCESSFUL


def test_rqs_stop_job_reaches_our_worker_which_cancels_the_job(side: Side) -> None:
    side.submit("job")
    stopped: list[str] = []
    with side.presence(on_stop_job=stopped.append):
        claim = side.worker().claim_one()
        wait_until(lambda: side.admin.pubsub_numsub("rq:pubsub:worker-a")[0][1] == 1, what="the worker to listen")
        send_stop_job_command(side.admin, "job", serializer=JSONSerializer)
        wait_until(lambda: stopped, what="the command")
        assert stopped == ["job"]
        side.store.cancel("job", execution=claim.execution)
    assert side.fetch("job").is_canceled
    assert side.state("job") is JobStatus.CANCELED


def test_rq_does_not_change_the_timeouts_of_our_connections(side: Side) -> None:
    pool = side.store.connections.commands.connection_pool
    before = dict(pool.connection_kwargs)
    with side.presence() as presence:
        presence.beat()
        assert presence.connection is side.store.connections.commands
    assert pool.connection_kwargs == before


def test_rqs_shutdown_reaches_our_worker(side: Side) -> None:
    told: list[str] = []
    with side.presence(on_shutdown=lambda: told.append("shutdown")):
        wait_until(lambda: side.admin.pubsub_numsub("rq:pubsub:worker-a")[0][1] == 1, what="the worker to listen")
        send_shutdown_command(side.admin, "worker-a")
        wait_until(lambda: told, what="the command")


def test_a_worker_whose_registration_expired_in_an_outage_comes_back_whole(side: Side) -> None:
    with side.presence() as presence:
        before = facts_of(side.admin)
        side.admin.delete(presence.key)
        assert Worker.all(connection=side.admin) == []
        presence.beat()
        presence.show(busy=False)
        assert facts_of(side.admin) == before


# Stock sweeps --------------------------------------------------------------------------------------------------


def _info(side: Side) -> None:
    assert side.rq_info()[0] == "queue latentq.sd.normal 0, 1 executing, 0 finished, 0 failed"


def _count(side: Side) -> None:
    assert side.registry(StartedJobRegistry).count == 1


def _ids(side: Side) -> None:
    assert side.registry(StartedJobRegistry).get_job_ids() == ["job"]


def _clock_20_s_ahead(side: Side) -> None:
    side.registry(StartedJobRegistry).cleanup(timestamp=time.time() + 20)


def _clock_a_day_ahead(side: Side) -> None:
    side.registry(StartedJobRegistry).cleanup(timestamp=time.time() + DAY_S)


def _clock_a_century_ahead(side: Side) -> None:
    side.registry(StartedJobRegistry).cleanup(timestamp=time.time() + 36_525 * DAY_S)


def _stock_maintenance(side: Side) -> None:
    worker = side.stock_worker("stock")
    worker.clean_registries()
    worker.clean_registries()


def _left_in_the_intermediate_queue(side: Side) -> None:
    """As a stock worker leaves it that died between pop and start; RQ fails such a job after a minute."""
    intermediate = IntermediateQueue(keys.rq_queue(QUEUE), connection=side.admin)
    side.admin.rpush(intermediate.key, "job")
    side.admin.set(intermediate.get_first_seen_key("job"), time.time() - 120, ex=DAY_S)
    side.stock_worker("stock").clean_registries()
    side.admin.delete(intermediate.key)


def _all_executions_of_the_worker(side: Side) -> None:
    for worker in Worker.all(connection=side.admin, serializer=JSONSerializer):
        assert [item.job_id for item in worker.get_current_executions()] == ["job"]


SWEEPS: Final = (
    _info,
    _count,
    _ids,
    _clock_20_s_ahead,
    _clock_a_day_ahead,
    _clock_a_century_ahead,
    _stock_maintenance,
    _left_in_the_intermediate_queue,
    _all_executions_of_the_worker,
)


@pytest.mark.parametrize("adopted", [False, True], ids=["claimed", "taken-up-again"])
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.__name__.strip("_"))
def test_no_stock_sweep_ends_a_live_job(side: Side, sweep: Callable[[Side], None], adopted: bool) -> None:
    side.submit("job")
    with side.presence() as presence:
        worker = side.worker(lease_s=0.1) if adopted else side.worker()
        claim = worker.claim_one()
        if adopted:
            wait_until(lambda: worker.store.reap("janitor", quiet_s=3600).jobs, what="the lease to end")
            assert worker.renew(claim) == ["adopted"]
        presence.show(busy=True)
        sweep(side)
        assert side.state("job") is JobStatus.PROCESSING
        assert side.fetch("job").get_status() == "started"
        assert side.listed() == {"Started": ["job"]}
        assert worker.renew(claim) == ["renewed"]
        assert worker.succeed(claim) is Outcome.COMPLETED
    assert side.fetch("job").is_finished


def test_no_stock_sweep_of_its_registries_ends_a_jobs_retention(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    worker.succeed(worker.claim_one())
    before = everything(side.admin)
    side.stock_worker("stock").clean_registries()
    side.registry(FinishedJobRegistry).cleanup(timestamp=time.time() + 20)
    assert_same(before, everything(side.admin))


# Jobs that are not ours ----------------------------------------------------------------------------------------


def _foreign_failed(side: Side, job_id: str) -> None:
    job = side.fetch(job_id)
    result = job.latest_result()
    assert result is not None
    assert result.type is Result.Type.FAILED
    assert result.exc_string is not None
    assert "enqueued with RQ itself" in result.exc_string
    assert "producer.DecodeClient" in result.exc_string
    assert job.get_status() == "failed"
    assert job.ended_at is not None
    assert job_id in side.registry(FailedJobRegistry).get_job_ids()
    assert rq_functions.called == []


def test_a_job_enqueued_with_rq_itself_fails_with_a_clear_error_and_is_never_called(side: Side) -> None:
    side.enqueue(rq_functions.succeed, "foreign")
    side.submit("ours")
    assert side.worker().claim_one().job_id == "ours"
    _foreign_failed(side, "foreign")
    assert side.queue.job_ids == []
    assert side.state("ours") is JobStatus.PROCESSING


def test_a_function_named_as_ours_is_no_job_of_ours_without_a_record(side: Side) -> None:
    side.queue.enqueue_call(DECODE_FUNCTION, args=["foreign"], job_id="foreign")
    assert side.worker().claim() == []
    _foreign_failed(side, "foreign")


@pytest.mark.parametrize(("own_ttl", "expected_s"), [(None, 7 * DAY_S), (100, 100), (-1, 7 * DAY_S)])
def test_a_job_that_is_not_ours_is_listed_as_long_as_it_asks_for_and_never_for_ever(
    side: Side, own_ttl: int | None, expected_s: int
) -> None:
    side.enqueue(rq_functions.succeed, "foreign", failure_ttl=own_ttl)
    assert side.worker().claim() == []
    for key in ("rq:job:foreign", "rq:results:foreign"):
        assert expected_s - 5 <= side.admin.ttl(key) <= expected_s
    listed_s = side.admin.zscore(f"rq:failed:{QUEUE}", "foreign") - time.time()
    assert listed_s == pytest.approx(expected_s, abs=5)


def test_a_job_that_is_not_ours_and_is_listed_twice_fails_once(side: Side) -> None:
    side.enqueue(rq_functions.succeed, "foreign")
    side.admin.rpush(keys.rq_queue(QUEUE), "foreign")
    assert side.worker().claim() == []
    assert side.queue.job_ids == []
    assert side.admin.xlen("rq:results:foreign") == 1


def test_a_job_that_is_not_ours_may_be_requeued_and_fails_again(side: Side) -> None:
    side.enqueue(rq_functions.succeed, "foreign")
    side.worker().claim()
    side.fetch("foreign").requeue()
    assert side.queue.job_ids == ["foreign"]
    assert side.worker().claim() == []
    _foreign_failed(side, "foreign")


@pytest.mark.parametrize("how", ["canceled", "deleted"])
def test_a_job_that_is_not_ours_and_was_ended_with_rqs_tools_leaves_no_trace_of_us(side: Side, how: str) -> None:
    job = side.enqueue(rq_functions.succeed, "foreign")
    if how == "canceled":
        job.cancel()
    else:
        job.delete()
    side.admin.rpush(keys.rq_queue(QUEUE), "foreign")
    before = everything(side.admin, but={keys.rq_queue(QUEUE)})
    assert side.worker().claim() == []
    assert_same(before, everything(side.admin, but={keys.rq_queue(QUEUE)}))
    if how == "canceled":
        job.delete()


def test_a_job_that_is_not_ours_is_not_taken_along_in_a_batch(side: Side) -> None:
    side.submit("first")
    side.enqueue(rq_functions.succeed, "foreign")
    side.submit("last")
    claims = side.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=1 << 30)
    assert [claim.job_id for claim in claims] == ["first", "last"]
    assert side.worker().claim() == []
    _foreign_failed(side, "foreign")


# Our jobs, changed with RQ's tools -----------------------------------------------------------------------------


def test_a_queued_job_canceled_with_rqs_tools_never_runs(side: Side) -> None:
    job, other = side.submit("job"), side.submit("other")
    job.cancel()
    side.admin.lpush(keys.rq_queue(QUEUE), "job")  # as if the cancel had come between two commands of a requeue
    assert [claim.job_id for claim in side.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=1 << 30)] == ["other"]
    assert side.worker().claim() == []
    assert job.is_canceled
    assert other.get_status() == "started"


def test_a_queued_job_canceled_with_rqs_tools_is_not_taken_along_in_a_batch(side: Side) -> None:
    side.submit("first")
    job = side.submit("job")
    job.cancel()
    side.admin.rpush(keys.rq_queue(QUEUE), "job")
    assert [claim.job_id for claim in side.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=1 << 30)] == ["first"]


def test_a_queued_job_deleted_with_rqs_tools_never_runs_and_rqs_hash_stays_deleted(side: Side) -> None:
    job = side.submit("job")
    job.delete()
    side.admin.rpush(keys.rq_queue(QUEUE), "job")
    assert side.worker().claim() == []
    assert not side.admin.exists("rq:job:job")
    assert side.store.cancel("job") == "canceled"
    assert not side.admin.exists("rq:job:job")
    assert side.listed() == {}


@pytest.mark.parametrize("how", ["empty", "delete"])
def test_a_queue_emptied_with_rqs_tools_goes_on_with_the_next_job(side: Side, how: str) -> None:
    side.submit("job")
    getattr(side.queue, how)()
    assert side.worker().claim() == []
    side.submit("next")
    assert side.worker().claim_one().job_id == "next"
    assert side.rq_info()[0].startswith("queue latentq.sd.normal 0, 1 executing")


def test_a_queued_job_enqueued_again_with_rqs_tools_runs_once(side: Side) -> None:
    job = side.submit("job")
    with pytest.raises(InvalidJobOperation):
        job.requeue()
    side.queue.enqueue_job(job)
    assert side.queue.job_ids == ["job", "job"]
    worker = side.worker()
    assert worker.claim_one().job_id == "job"
    assert worker.claim() == []
    assert side.queue.job_ids == []


def test_a_failed_job_requeued_with_rqs_tools_does_not_run_again(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    worker.fail(worker.claim_one())
    side.fetch("job").requeue()
    assert side.queue.job_ids == ["job"]
    assert worker.claim() == []
    assert side.state("job") is JobStatus.FAILED


def test_a_running_job_canceled_with_rqs_tools_is_canceled_by_its_worker(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    claim = worker.claim_one()
    side.fetch("job").cancel()
    assert worker.renew(claim) == ["cancel"]
    assert side.store.cancel("job", execution=claim.execution) == "canceled"
    assert side.listed() == {"Canceled": ["job"]}


def _fails(side: Side, claim: Claim) -> None:
    assert side.worker().fail(claim, retryable=True) is Outcome.CANCELED


def _hands_back(side: Side, claim: Claim) -> None:
    assert side.store.release([claim]) == 0


def _dies(side: Side, claim: Claim) -> None:
    store = side.worker(lease_s=0.1).store
    assert wait_until(lambda: store.reap("janitor", quiet_s=3600).jobs) == {"job": "canceled"}


@pytest.mark.parametrize("worker_then", [_fails, _hands_back, _dies], ids=lambda then: then.__name__.strip("_"))
@pytest.mark.parametrize("how", ["canceled", "deleted"])
def test_a_running_job_ended_with_rqs_tools_does_not_go_back_into_the_queue(
    side: Side, how: str, worker_then: Callable[[Side, Claim], None]
) -> None:
    side.submit("job")
    claim = side.worker(lease_s=0.1).claim_one()
    if how == "canceled":
        side.fetch("job").cancel()
    else:
        side.fetch("job").delete()
    worker_then(side, claim)
    assert side.queue.job_ids == []
    assert side.state("job") is JobStatus.CANCELED
    assert side.listed() == ({"Canceled": ["job"]} if how == "canceled" else {})


def test_a_running_job_deleted_with_rqs_tools_still_completes_and_rqs_hash_is_not_made_again(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    claim = worker.claim_one()
    side.fetch("job").delete()
    assert worker.renew(claim, stage="device") == ["renewed"]
    assert not side.admin.exists("rq:job:job")
    assert worker.succeed(claim) is Outcome.COMPLETED
    with pytest.raises(NoSuchJobError):
        side.fetch("job")
    assert side.state("job") is JobStatus.SUCCEEDED
    assert side.listed() == {}


def test_a_running_job_canceled_with_rqs_tools_that_completes_all_the_same_is_listed_once(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    claim = worker.claim_one()
    side.fetch("job").cancel()
    assert worker.succeed(claim) is Outcome.COMPLETED
    assert side.fetch("job").is_finished
    assert side.listed() == {"Finished": ["job"]}


def test_a_stock_worker_on_our_queue_loses_nothing_and_says_what_to_do(side: Side) -> None:
    side.submit("job")
    worker = side.stock_worker("stock")
    worker.register_birth()
    found = Queue.dequeue_any([side.queue], None, connection=side.admin, serializer=JSONSerializer)
    assert found is not None
    worker.execute_job(*found)
    worker.register_death()
    result = side.fetch("job").latest_result()
    assert result is not None
    assert "latentq worker" in (result.exc_string or "")
    assert side.state("job") is JobStatus.QUEUED
    assert side.store.audit(["job"], settle_s=-1) == {"job": "requeued"}
    assert side.admin.ttl("rq:job:job") == -1
    assert side.listed() == {}
    assert side.worker().claim_one().job_id == "job"
