"""What the doctor finds in jobs, queues and keys: the fault is made, and found with its fix."""

from __future__ import annotations

import threading

import pytest
import redis

from broker_config import keys
from broker_config.connection import Connections
from broker_config.job_audit import audit_jobs
from broker_config.job_store import JobStore
from producer import DecodeClient
from producer.doctor import Finding, Level
from tests.operations.conftest import Made, Of, Run


def test_a_missing_or_hanging_janitor_is_a_problem(finding: Of, store: JobStore, admin: redis.Redis) -> None:
    assert finding("janitor").finding.startswith("none leads")
    store.lead("janitor-1", ttl_s=60)
    store.reap("janitor-1", quiet_s=10)
    assert finding("janitor") == Finding(check="janitor", level=Level.OK, finding="janitor-1 leads")
    admin.hset(keys.REAPER, "at_ms", store.now_ms() - 60_000)
    hanging = finding("janitor")
    assert (hanging.level, "not looked at the leases for 60 s" in hanging.finding) == (Level.PROBLEM, True)


def test_a_job_whose_lease_ended_and_that_nobody_took_back_is_a_problem(
    finding: Of, made: Made, store: JobStore, admin: redis.Redis
) -> None:
    made.processing("stuck")
    assert finding("leases").level is Level.OK
    admin.zadd(keys.LEASES, {"stuck": store.now_ms() - 60_000})
    assert finding("leases").finding == "1 job without a live worker: stuck"
    assert finding("leases").level is Level.PROBLEM
    store.reap("janitor-1", quiet_s=10)  # the first look after an outage gives everyone a lease length
    assert finding("leases").level is Level.WARNING


def test_rqs_suspend_is_a_warning(finding: Of, admin: redis.Redis) -> None:
    assert finding("suspended").level is Level.OK
    admin.set(keys.RQ_SUSPENDED, 1, ex=60)
    assert finding("suspended").level is Level.WARNING


def test_waiting_jobs_that_no_worker_serves_are_a_problem(finding: Of, made: Made) -> None:
    made.queued("one")
    made.queued("two", priority="high")
    assert finding("unserved VAEs") == Finding(
        check="unserved VAEs",
        level=Level.PROBLEM,
        finding="no live worker serves sdxl (2 jobs waiting)",
        fix="start one: `latentq worker --vae sdxl`",
    )
    made.serving("worker-1", "sdxl")
    assert finding("unserved VAEs").level is Level.OK


def test_a_paused_vae_with_waiting_jobs_is_a_warning_and_one_without_is_not(finding: Of, made: Made, cli: Run) -> None:
    cli("pause", "sdxl")
    assert finding("paused VAEs").level is Level.OK
    made.queued("held")
    assert finding("paused VAEs").level is Level.WARNING
    assert finding("unserved VAEs").level is Level.OK
    cli("resume", "sdxl")
    assert finding("paused VAEs").level is Level.OK


def test_a_long_wait_of_a_served_vae_is_a_warning(finding: Of, made: Made, store: JobStore, admin: redis.Redis) -> None:
    made.serving("worker-1", "sdxl")
    assert finding("waits").finding == "no job waits"
    made.queued("slow")
    assert finding("waits").level is Level.OK
    admin.hset(keys.job("slow"), "submitted_ms", store.now_ms() - 3_600_000)
    found = finding("waits")
    assert (found.level, found.finding) == (Level.WARNING, "the oldest job waits for 60 min (sdxl.normal)")
    assert finding("waits", long_wait_s=7200).level is Level.OK


def test_parked_jobs_are_a_warning(finding: Of, made: Made, store: JobStore, admin: redis.Redis) -> None:
    assert finding("parked jobs").level is Level.OK
    made.queued("new")
    admin.hset(keys.job("new"), "schema", 99)
    store.claim(token="token", worker="old", vaes=["sdxl"])
    found = finding("parked jobs")
    assert (found.level, found.finding[:30]) == (Level.WARNING, "1 job of a newer message versi")
    assert finding("lost jobs").level is Level.OK


def backdate(admin: redis.Redis, job_id: str, field: str) -> None:
    admin.hincrby(keys.job(job_id), field, -60_000)


def test_a_job_on_no_list_is_found_once_it_has_had_time_to_get_there(
    finding: Of, made: Made, admin: redis.Redis
) -> None:
    made.queued("lost")
    made.queued("waits")
    admin.lrem(keys.rq_queue("latentq.sdxl.normal"), 0, "lost")
    assert finding("lost jobs").level is Level.OK
    backdate(admin, "lost", "queued_ms")
    backdate(admin, "waits", "queued_ms")
    found = finding("lost jobs")
    assert (found.level, found.finding) == (Level.PROBLEM, "1 job queued, but on no list: lost")


@pytest.mark.usefixtures("janitor")
def test_a_running_job_without_lease_is_found_and_the_janitor_that_leads_mends_it(
    finding: Of, made: Made, store: JobStore, admin: redis.Redis
) -> None:
    made.processing("runs")
    made.processing("lost", "sd")
    backdate(admin, "runs", "started_ms")
    backdate(admin, "lost", "started_ms")
    admin.zrem(keys.LEASES, "lost")
    found = finding("lost jobs")
    assert (found.level, found.finding) == (Level.WARNING, "1 job processing, but without lease: lost")
    assert store.audit(["lost"], settle_s=5) == {"lost": "leased"}
    assert finding("lost jobs").level is Level.OK


def test_totals_that_drifted_are_found_and_the_fix_is_the_truth(finding: Of, made: Made, admin: redis.Redis) -> None:
    made.queued("one")
    made.failed("ended", "sd")
    made.processing("two", "sd")
    assert finding("totals").finding == "2 unfinished jobs, as counted"
    latents_bytes = int(admin.hget(keys.TOTALS, "latents_bytes") or 0)
    admin.hincrby(keys.TOTALS, "jobs", 3)
    admin.hincrby(keys.TOTALS, "latents_bytes", -8)
    found = finding("totals")
    assert found.level is Level.WARNING
    assert found.finding == (
        f"admission counts jobs 5 instead of 2, latents_bytes {latents_bytes - 8} instead of {latents_bytes}"
    )
    assert f"HSET latentq:totals jobs 2 latents_bytes {latents_bytes} reserved_bytes 1024" in (found.fix or "")


def test_a_key_that_nothing_will_delete_is_found(finding: Of, made: Made, admin: redis.Redis) -> None:
    made.succeeded("done")
    made.processing("runs")
    made.queued("waits", "sd")
    admin.set("someone:elses", "key")
    admin.hset(keys.rq_job("elses"), mapping={"origin": "default", "status": "finished"})
    assert finding("keys").level is Level.OK
    blob = keys.blob("orphan.in.0123")
    admin.set(blob, b"latents that nobody owns")
    admin.persist(keys.job("done"))
    admin.persist(keys.owners("done.out"))
    found = finding("keys")
    assert found.level is Level.WARNING
    assert found.finding == (f"3 keys that nothing will delete: {blob}, {keys.job('done')}, {keys.owners('done.out')}")
    for key in (blob, keys.job("done"), keys.owners("done.out"), "someone:elses", keys.rq_job("elses")):
        admin.delete(key)


def test_a_walk_that_is_cut_short_says_so(finding: Of, made: Made) -> None:
    for number in range(1200):
        made.queued(f"job-{number}")
    assert finding("keys", max_keys=1).finding.startswith("each of the first ")
    assert "too many keys" in finding("totals", max_keys=1).finding
    assert finding("totals").finding == "1200 unfinished jobs, as counted"


def test_what_changes_during_the_walk_is_not_called_an_error(
    made: Made, connections: Connections, client: DecodeClient
) -> None:
    for number in range(20):
        made.queued(f"standing-{number}", "sd")
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            made.succeeded(f"passing-{number}")

    thread = threading.Thread(target=churn, name="churn")
    thread.start()
    try:
        audits = [audit_jobs(connections, max_keys=100_000) for _ in range(10)]
    finally:
        stop.set()
        thread.join()
    assert [(item.unlisted, item.unleased, item.immortal) for item in audits] == [((), (), ())] * 10
    compared = [item for item in audits if item.recounted is not None]
    assert compared
    assert [item.totals for item in compared] == [item.recounted for item in compared]
