"""What one round of a janitor gets done, and how soon another takes over."""

from __future__ import annotations

import threading

import pytest

from broker_config import keys
from broker_config.messages import Mode
from tests.support.store_queue import NO_OUTAGE_S, PX, SHORT_S, Queue
from tests.support.wait import wait_until
from worker import janitor
from worker.janitor import Janitor

#: More than go into three scripts.
MANY = 7


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "_BATCH", 2)


def test_all_jobs_of_workers_that_died_together_are_back_after_one_round(queue: Queue) -> None:
    jobs = queue.submit_many(MANY)
    dead = queue.worker("dead", lease_s=SHORT_S)
    dead.claim(mode=Mode.FAST, max_jobs=MANY, max_px=MANY * PX)
    assert queue.waiting() == []
    queue.store().reap("janitor", quiet_s=NO_OUTAGE_S)  # the first look starts a grace period
    queue.admin.hset(keys.REAPER, "grace_ms", 0)
    queue.wait_ms(SHORT_S * 1000 + 1)
    Janitor(queue.store(), name="janitor").tick()
    assert sorted(queue.waiting()) == sorted(jobs)


def test_all_retentions_that_are_over_end_in_one_round(queue: Queue) -> None:
    for job in queue.submit_many(MANY, retention_s=0.001):
        queue.store().cancel(job)
    queue.wait_ms(5)
    Janitor(queue.store(), name="janitor").tick()
    assert queue.admin.zcard(keys.RETENTION) == 0


def lose_all_but_the_records(queue: Queue) -> list[str]:
    """Jobs that are queued but on no list."""
    jobs = queue.submit_many(MANY)
    queue.admin.delete(keys.rq_queue(keys.queue_name("sd", keys.Priority.NORMAL)))
    queue.wait_ms(5)
    return jobs


def test_one_round_walks_on_over_the_keys_until_its_time_is_over(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step looks at so many keys, of whatever kind: a job has several, and others may be in the broker, too."""
    monkeypatch.setattr(janitor, "_SETTLE_S", 0.001)
    monkeypatch.setattr(janitor, "_SCAN_COUNT", 1)
    monkeypatch.setattr(janitor, "_WALK_S", 3600.0)
    jobs = lose_all_but_the_records(queue)
    Janitor(queue.store(), name="janitor").tick()
    assert sorted(queue.waiting()) == sorted(jobs)


def test_one_round_takes_one_step_if_that_is_all_its_time(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(janitor, "_SETTLE_S", 0.001)
    monkeypatch.setattr(janitor, "_SCAN_COUNT", 1)
    monkeypatch.setattr(janitor, "_WALK_S", 0.0)
    jobs = lose_all_but_the_records(queue)
    one = Janitor(queue.store(), name="janitor")
    one.tick()
    assert len(queue.waiting()) < len(jobs)

    def all_are_back() -> bool:
        one.tick()
        return sorted(queue.waiting()) == sorted(jobs)

    wait_until(all_are_back, what="the walk to come round")


def test_a_janitor_that_is_killed_is_replaced_within_three_seconds(queue: Queue) -> None:
    store = queue.store()
    standby = Janitor(store, name="standby")
    assert store.lead("killed", ttl_s=janitor._LEAD_S)
    since = store.now_ms()
    thread = threading.Thread(target=standby.run, name="standby")
    thread.start()
    try:
        wait_until(lambda: standby.leads, what="the standby to lead")
        assert store.now_ms() - since <= 3000
    finally:
        standby.stop()
        thread.join(30)
    assert not thread.is_alive()
