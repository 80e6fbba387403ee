"""A key that is of another kind, or no text, stands in the way of its own job and of no other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from broker_config import keys
from broker_config.claims import Outcome
from broker_config.errors import JobNotFound
from broker_config.job_list import JobList
from broker_config.job_status import JobStatus
from broker_config.messages import Mode
from broker_config.queue_report import QueueReport
from broker_config.webhooks import Webhook, WebhookEvent
from tests.support.store_queue import LONG_S, NO_OUTAGE_S, PX, Queue, ids
from tests.support.wait import wait_until
from worker.janitor import Janitor

FAILED = keys.rq_registry("failed", keys.queue_name("sd", "normal"))


def reap_now(queue: Queue, *jobs: str) -> dict[str, str]:
    """Looks at the leases of these jobs as though they had ended."""
    queue.store().reap("janitor", quiet_s=NO_OUTAGE_S)
    queue.admin.hset(keys.REAPER, "grace_ms", 0)
    queue.admin.zadd(keys.LEASES, {job: 1 + number for number, job in enumerate(jobs)})
    return dict(queue.store().reap("janitor", quiet_s=NO_OUTAGE_S).jobs)


def test_a_lease_whose_job_cannot_go_back_does_not_hold_up_the_others(queue: Queue) -> None:
    broken, fine = queue.submit(vae="sdxl"), queue.submit()
    queue.worker("w", "sdxl").claim_one()
    queue.worker().claim_one()
    registry = keys.rq_registry("failed", keys.queue_name("sdxl", "normal"))
    queue.admin.set(registry, "of another kind")
    assert reap_now(queue, broken, fine) == {broken: "broken", fine: "requeued"}
    assert queue.admin.zscore(keys.LEASES, broken) > queue.store().now_ms() + LONG_S * 500  # looked at again later
    queue.admin.delete(registry)
    assert reap_now(queue, broken) == {broken: "requeued"}


def test_a_death_counts_once_however_often_its_job_cannot_go_back(queue: Queue) -> None:
    job = queue.submit()
    worker = queue.worker()
    worker.renew(worker.claim_one(), stage="device")
    queue.admin.set(FAILED, "of another kind")
    for _ in range(5):
        assert reap_now(queue, job) == {job: "broken"}
    queue.admin.delete(FAILED)
    assert reap_now(queue, job) == {job: "crashed"}
    snapshot = queue.store().snapshot(job)
    assert (snapshot.status, snapshot.crash_count, len(snapshot.errors)) == (JobStatus.QUEUED, 1, 1)


def test_a_late_job_that_cannot_be_ended_does_not_hold_up_the_others(queue: Queue) -> None:
    fine = queue.submit()
    queue.admin.hset(keys.job(fine), "deadline_ms", 1)
    queue.admin.set(keys.job("broken"), "of another kind", ex=60)
    queue.admin.zadd(keys.DEADLINES, {"broken": 1, fine: 2})
    janitor = Janitor(queue.store(), name="janitor")
    for _ in range(2):  # the broken one ends its round, and is not in the next one
        janitor.tick()
    assert queue.state(fine) is JobStatus.FAILED


@pytest.mark.parametrize("key", [keys.job, keys.rq_job], ids=["record", "hash of RQ"])
def test_a_job_that_cannot_be_read_does_not_close_its_queue(queue: Queue, key: Callable[[str], str]) -> None:
    broken, fine, behind = queue.submit_many(3)
    kept = f"kept:{broken}"
    queue.admin.rename(key(broken), kept)
    queue.admin.set(key(broken), "of another kind")
    claims = queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=PX * 8)
    assert ids(claims) == [fine, behind]
    queue.admin.rename(kept, key(broken))
    queue.admin.hset(keys.job(broken), "queued_ms", 1)
    assert queue.store().audit([broken], settle_s=1) in ({broken: "requeued"}, {broken: "mended"})
    assert queue.worker().claim_one().job_id == broken


@pytest.mark.parametrize("field", ["latents_bytes", "blob"])
def test_a_record_that_lacks_a_field_is_claimed_without_its_latents(queue: Queue, field: str) -> None:
    """A claim that raised then would have claimed jobs that nobody hears of."""
    broken, fine = queue.submit_many(2)
    queue.admin.hdel(keys.job(broken), field)
    claims = queue.worker().claim(mode=Mode.FAST, max_jobs=8, max_px=PX * 8)
    assert [(claim.job_id, claim.latents) for claim in claims] == [(broken, None), (fine, b"latents")]


def test_a_job_that_cannot_be_read_does_not_keep_others_from_being_renewed(queue: Queue) -> None:
    broken, fine = queue.submit_many(2)
    worker = queue.worker()
    claims = [worker.claim_one() for _ in range(2)]
    queue.admin.rename(keys.job(broken), "kept")
    queue.admin.set(keys.job(broken), "of another kind")
    before = queue.admin.zscore(keys.LEASES, fine)
    queue.wait_ms(5)
    assert worker.renew(*claims) == ["lost", "renewed"]
    assert queue.admin.zscore(keys.LEASES, fine) > before
    assert worker.succeed(claims[0]) is Outcome.LOST
    queue.admin.rename("kept", keys.job(broken))
    assert worker.succeed(claims[0]) is Outcome.COMPLETED


def test_an_audit_mends_the_others(queue: Queue) -> None:
    lost = queue.submit()
    queue.admin.delete(keys.rq_queue(keys.queue_name("sd", "normal")))
    queue.admin.hset(keys.job(lost), "queued_ms", 1)
    queue.admin.set(keys.job("broken"), "of another kind", ex=60)
    assert queue.store().audit(["broken", lost], settle_s=1) == {"broken": "broken", lost: "requeued"}


@pytest.mark.parametrize("key", [FAILED, "rq:results:job"], ids=["registry", "results"])
@pytest.mark.parametrize("ends", ["succeed", "fail"])
def test_a_key_of_another_kind_where_rq_has_its_own_keeps_nobody_from_hearing_of_the_end(
    queue: Queue, key: str, ends: str
) -> None:
    """A script that raised after it wrote the state would leave waiters and webhooks without a word, for good."""
    hook = Webhook(url="https://hooks.example/done", events=(WebhookEvent.SUCCEEDED, WebhookEvent.FAILED), inline=False)
    secrets = ["whsec_" + "a" * 32]
    assert queue.store(webhook_allow=("hooks.example",)).submit(queue.request("job", webhook=hook), secrets=secrets)
    worker = queue.worker()
    claim = worker.claim_one()
    queue.admin.set(key, "of another kind")
    heard = queue.admin.pubsub()
    heard.subscribe(keys.ENDED_CHANNEL)
    outcome = worker.succeed(claim) if ends == "succeed" else worker.fail(claim)
    assert outcome in (Outcome.COMPLETED, Outcome.FAILED)
    wait_until(lambda: (heard.get_message(ignore_subscribe_messages=True) or {}).get("data") == b"job", what="the ring")
    event = "succeeded" if ends == "succeed" else "failed"
    assert queue.admin.hget(keys.delivery(f"msg_job_{event}"), "state") == b"pending"
    assert queue.totals()["jobs"] == 0


@pytest.mark.parametrize("step", ["_reap", "_end_overdue", "_audit"])
def test_a_part_of_the_janitors_round_that_fails_does_not_stop_the_others(
    queue: Queue, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue.submit(retention_s=0.01)
    worker = queue.worker()
    worker.succeed(worker.claim_one())
    janitor = Janitor(queue.store(), name="janitor")

    def broken() -> None:
        raise ValueError("nobody expected this")

    monkeypatch.setattr(janitor, step, broken)

    def retired() -> bool:
        janitor.tick()
        return bool(queue.admin.hget(keys.job(job), "state") == b"expired")

    wait_until(retired, what="the end of its retention")


def test_a_record_that_was_written_over_is_gone_and_hides_no_other(queue: Queue) -> None:
    broken, fine = queue.submit_many(2)
    queue.admin.rename(keys.job(broken), "kept")
    queue.admin.set(keys.job(broken), "of another kind")
    jobs = JobList(queue.store().connections)
    assert [row.job_id for row in jobs.page().rows] == [fine]
    assert [row.job_id for row in jobs.page(status=JobStatus.QUEUED, vae="sd").rows] == [fine]
    assert list(queue.store().find([broken, fine])) == [fine]
    with pytest.raises(JobNotFound, match=broken):
        queue.store().snapshot(broken)
    with pytest.raises(JobNotFound, match=broken):
        queue.store().ended([fine, broken])
    (report,) = QueueReport(queue.store().connections).queues("sd")
    assert report.oldest_s is not None
    queue.admin.rename("kept", keys.job(broken))


def test_ids_that_are_no_text_do_not_stop_the_audit(queue: Queue) -> None:
    """They are in a queue, and a record of theirs is met on the walk over all of them."""
    raw = b"\xff\xfe"
    queue.admin.rpush(keys.rq_queue(keys.queue_name("sdxl", "normal")), raw)
    queue.admin.sadd(keys.RQ_QUEUES, keys.rq_queue(keys.queue_name("sdxl", "normal")))
    queue.admin.set(keys.job("").encode() + raw, "of another kind", ex=60)
    lost = queue.submit()
    queue.admin.delete(keys.rq_queue(keys.queue_name("sd", "normal")))
    queue.admin.hset(keys.job(lost), "queued_ms", 1)
    janitor = Janitor(queue.store(), name="janitor")

    def mended() -> bool:
        janitor.tick()
        return queue.waiting() == [lost]

    wait_until(mended, what="the audit")
