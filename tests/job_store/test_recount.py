"""What admission counts is set right when someone deleted keys, and left alone when it is right."""

from __future__ import annotations

from broker_config import keys
from tests.support.store_queue import Queue
from worker.janitor import Janitor

MOST = 1000


def test_what_is_right_is_left_alone_wherever_the_jobs_are(queue: Queue) -> None:
    ended, running, _, parked = queue.submit_many(4)
    worker = queue.worker()
    worker.succeed(worker.claim_one())
    assert worker.claim_one().job_id == running
    queue.submit(vae="flux", latents=b"other latents")
    queue.admin.lrem(keys.rq_queue(keys.queue_name("sd", "normal")), 1, parked)
    queue.admin.zadd(keys.PARKED, {parked: 99})
    before = queue.totals()
    assert before["jobs"] == 4
    assert queue.store().recount(most=MOST) == {}
    assert queue.totals() == before
    assert queue.store().snapshot(ended).status.is_terminal
    queue.store().cancel(parked)


def test_deleted_totals_are_counted_anew(queue: Queue) -> None:
    queue.submit_many(3)
    right = queue.totals()
    queue.admin.delete(keys.TOTALS)
    found = queue.store().recount(most=MOST)
    assert found["jobs"] == (0, 3)
    assert {name: value for name, value in queue.totals().items() if value} == {
        name: value for name, value in right.items() if value
    }


def test_jobs_whose_records_were_deleted_are_not_counted_for_ever(queue: Queue) -> None:
    gone, _ = queue.submit_many(2)
    queue.admin.delete(keys.job(gone), keys.rq_job(gone), keys.owners(f"{gone}.in"), keys.blob(f"{gone}.in"))
    assert queue.totals()["jobs"] == 2
    Janitor(queue.store(), name="janitor").tick()
    assert queue.totals()["jobs"] == 1


def test_an_id_that_is_in_its_queue_twice_counts_once(queue: Queue) -> None:
    job = queue.submit()
    queue.admin.rpush(keys.rq_queue(keys.queue_name("sd", "normal")), job)
    assert queue.store().recount(most=MOST) == {}


def test_more_jobs_than_can_be_counted_at_once_are_not(queue: Queue) -> None:
    queue.submit_many(3)
    queue.admin.delete(keys.TOTALS)
    assert queue.store().recount(most=2) == {}
    assert queue.store().recount(most=3)["jobs"] == (0, 3)
