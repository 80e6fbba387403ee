"""Claims: in which order, by which token."""

from __future__ import annotations

import pytest

from broker_config import keys
from broker_config.job_status import JobStatus
from broker_config.job_store import ALONG_BYTES
from broker_config.keys import Priority
from broker_config.messages import Mode
from tests.support.broker_contents import assert_same, everything
from tests.support.store_queue import LONG_S, PX, SHORT_S, Queue, ids
from tests.support.store_worker import StoreWorker

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


def test_small_latents_come_along_with_their_claim_and_large_ones_do_not(queue: Queue) -> None:
    small, large, gone = b"s" * ALONG_BYTES, b"l" * (ALONG_BYTES + 1), b"gone"
    for latents in (small, large, gone):
        queue.submit(f"job-of-{latents[:1].decode()}", latents=latents)
    queue.admin.delete(keys.blob("job-of-g.in"))
    worker = queue.worker()
    assert [worker.claim_one().latents for _ in range(3)] == [small, None, None]


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
