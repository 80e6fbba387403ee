"""Scripts stay short however long a queue is: they hold the broker while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from broker_config import keys
from broker_config.job_status import JobStatus
from tests.support.store_queue import Queue

#: Ids without a job: enough for a walk over all of them to be told from one over a few.
FILLERS = 20_000


def fill(queue: Queue) -> None:
    key = keys.rq_queue(keys.queue_name("sd", "normal"))
    queue.admin.rpush(key, *(f"filler-{number}" for number in range(FILLERS)))


def late(queue: Queue, count: int) -> list[str]:
    """Jobs at the end of the queue whose start deadline passed."""
    jobs = queue.submit_many(count)
    for number, job in enumerate(jobs):
        queue.admin.hset(keys.job(job), "deadline_ms", 1)
        queue.admin.zadd(keys.DEADLINES, {job: 1 + number})
    return jobs


def test_late_jobs_are_ended_as_far_as_the_walk_may_go_and_the_rest_next_time(queue: Queue) -> None:
    fill(queue)
    jobs = late(queue, 5)
    store = queue.store()
    # To find a job and to take it out, each walks over the fillers.
    assert store.overdue(places=3 * FILLERS) == jobs[:2]
    assert store.overdue(places=0) == []
    assert [queue.state(job) for job in jobs] == [JobStatus.FAILED] * 2 + [JobStatus.QUEUED] * 3
    assert store.overdue() == jobs[2:]
    assert store.overdue() == []


@contextmanager
def commands_of(queue: Queue) -> Iterator[list[bytes]]:
    """Notes the commands of the block, those of scripts too."""
    before = queue.admin.config_get("slowlog-*")
    queue.admin.config_set("slowlog-max-len", 1000)
    queue.admin.config_set("slowlog-log-slower-than", 0)
    queue.admin.slowlog_reset()
    commands: list[bytes] = []
    try:
        yield commands
    finally:
        commands += [entry["command"] for entry in reversed(queue.admin.slowlog_get(1000))]
        for name, value in before.items():
            queue.admin.config_set(name, value)


@pytest.mark.parametrize("side", ["head", "tail"])
def test_a_job_at_either_end_of_a_long_queue_is_found_there(queue: Queue, side: str) -> None:
    """The janitor asks of jobs that came since it last looked; these are in their queue, and stay where they are."""
    key = keys.rq_queue(keys.queue_name("sd", "normal"))
    fill(queue)
    job = queue.submit()
    if side == "head":
        queue.admin.lrem(key, -1, job)
        queue.admin.lpush(key, job)
    queue.admin.hset(keys.job(job), "queued_ms", 1)
    before = queue.admin.lrange(key, 0, -1)
    with commands_of(queue) as commands:
        assert queue.store().audit([job], settle_s=1) == {}
    assert queue.admin.lrange(key, 0, -1) == before
    found = [command for command in commands if command.startswith(b"LPOS")]
    assert found[0].split()[-2:] == [b"MAXLEN", b"1000"]
    assert all(call.split()[-2:] == [b"RANK", b"-1"] for call in found[1:])
    assert len(found) == (1 if side == "head" else 2)
