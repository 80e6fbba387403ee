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
