"""A broker that is full, and the times that scripts write."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rq.utils import utcformat

from broker_config import keys, scripts
from broker_config.claims import Outcome
from broker_config.errors import (
    BrokerRefusesWrites,
    QueueFull,
)
from broker_config.external_index import ExternalIndex
from broker_config.job_status import JobStatus
from broker_config.messages import SCHEMA_VERSION
from tests.support.broker_contents import assert_same, everything
from tests.support.store_queue import SHORT_S, Queue, end

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
    late, lost, parked = queue.submit(), queue.submit(), queue.submit()
    queue.admin.hset(keys.job(late), "deadline_ms", 1)
    queue.admin.zadd(keys.DEADLINES, {late: 1})
    for job in (lost, parked):
        queue.admin.lrem(keys.rq_queue(keys.queue_name("sd", "normal")), 0, job)
    queue.admin.hset(keys.job(lost), "queued_ms", 1)
    queue.admin.zadd(keys.PARKED, {parked: SCHEMA_VERSION})
    queue.admin.zadd(keys.doomed("store"), {"blob": 1})
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
        assert store.overdue() == [late]
        assert store.audit([lost], settle_s=1) == {lost: "requeued"}
        assert store.unpark() == 1
        ExternalIndex(queue.connections).postpone("store", "blob", delay_s=60.0)
        assert queue.admin.zscore(keys.doomed("store"), "blob") > store.now_ms()
    assert queue.waiting()[:2] == [parked, lost]
    assert [queue.state(job) for job in (late, lost, parked)] == [
        JobStatus.FAILED,
        JobStatus.QUEUED,
        JobStatus.QUEUED,
    ]
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
    end(queue, job)
    after = queue.store().now_ms()
    snapshot = queue.store().snapshot(job)
    assert before <= snapshot.submitted_ms <= snapshot.started_ms <= snapshot.ended_ms <= after
    (entry,) = queue.admin.xrange(keys.rq_results(job))
    assert json.loads(entry[1][b"execution_ended_at"]) == snapshot.ended_ms / 1000
