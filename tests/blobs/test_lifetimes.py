"""Blobs outside the broker live as long as the jobs that own them, no longer, and never shorter.

Time is moved by writing scores: what a test calls `lapse` is what the broker's clock does to a reservation.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest

from broker_config import keys
from broker_config.claims import Claim, Outcome
from broker_config.connection import Connections
from broker_config.decode_result import Artifact, DecodeResult
from broker_config.errors import BlobStoreUnavailable, JobConflict, QueueFull, ResultExpired
from broker_config.external_store import ExternalStore
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.messages import BlobRef, DecodeRequest
from broker_config.settings import Settings
from broker_config.tiered_blob_store import TieredBlobStore
from producer import DecodeClient
from tests.support.external_stores import BeforeSubmit, end_retention, lapse, latents_of, names_in
from tests.support.store_worker import StoreWorker
from worker.blob_sweeper import BlobSweeper
from worker.janitor import Janitor

#: 4 kB, with a threshold of 1 kB.
LATENTS: Final = np.random.default_rng(7).standard_normal((1, 4, 16, 16)).astype(np.float32)
PICTURE: Final = b"picture" * 1000


@pytest.fixture
def place(file_place: dict[str, Any]) -> dict[str, Any]:
    """In a folder: which store it is makes no difference here (`test_large_blobs_end_to_end.py` has both)."""
    return file_place


# The way of a blob -------------------------------------------------------------------------------------------


def test_latents_and_artifacts_go_with_their_job(
    client: DecodeClient,
    worker: StoreWorker,
    outer: ExternalStore,
    sweeper: BlobSweeper,
    store: JobStore,
    admin: Any,
) -> None:
    job = client.submit(LATENTS, vae="sd")
    assert names_in(outer) == {latents_of(job).name}
    claim = worker.claim_one()
    assert worker.blobs.get(worker.request(claim).latents)
    result = worker.result(claim, data=PICTURE)
    assert store.complete(claim, result) is Outcome.COMPLETED
    sweeper.sweep()
    assert names_in(outer) == {latents_of(job).name, result.artifacts[0].blob.name}
    assert job.artifacts() == [(result.artifacts[0], PICTURE)]

    end_retention(admin, job)
    Janitor(store, name="janitor").tick()
    assert job.status() is JobStatus.EXPIRED
    assert sweeper.sweep() == 2
    assert names_in(outer) == set()
    assert admin.keys("latentq:external:*") + admin.keys("latentq:doomed:*") == []


def test_the_janitor_retires_a_job_whose_owners_have_expired_by_themselves(
    client: DecodeClient, worker: StoreWorker, store: JobStore, sweeper: BlobSweeper, outer: ExternalStore, admin: Any
) -> None:
    job = client.submit(LATENTS, vae="sd", retention_s=3600)
    worker.fail(worker.claim_one())
    owners = keys.owners(f"{latents_of(job).store}/{latents_of(job).name}")
    assert 3_500_000 < admin.pttl(owners) <= 3_600_000
    assert admin.zscore(keys.external(latents_of(job).store), latents_of(job).name) == admin.zscore(owners, job.id)
    admin.delete(owners)
    admin.zadd(keys.RETENTION, {job.id: 1})
    assert store.retire() == 1
    assert sweeper.sweep() == 1
    assert names_in(outer) == set()


def test_ack_frees_at_once(
    client: DecodeClient, worker: StoreWorker, sweeper: BlobSweeper, outer: ExternalStore
) -> None:
    job = client.submit(LATENTS, vae="sd")
    claim = worker.claim_one()
    worker.store.complete(claim, worker.result(claim, data=PICTURE))
    assert len(names_in(outer)) == 2
    job.ack()
    assert sweeper.sweep() == 2
    assert names_in(outer) == set()


def test_a_redecode_keeps_the_latents_of_the_first_job(
    client: DecodeClient,
    worker: StoreWorker,
    store: JobStore,
    sweeper: BlobSweeper,
    outer: ExternalStore,
    admin: Any,
) -> None:
    first = client.submit(LATENTS, vae="sd")
    worker.fail(worker.claim_one())
    second = first.redecode(output="webp")
    latents = latents_of(first)
    assert latents_of(second) == latents
    first.ack()
    sweeper.sweep()
    assert names_in(outer) == {latents.name}
    claim = worker.claim_one()
    assert len(worker.blobs.get(latents)) == latents.size_bytes
    worker.fail(claim)
    sweeper.sweep()
    assert names_in(outer) == {latents.name}
    end_retention(admin, second)
    store.retire()
    assert sweeper.sweep() == 1
    assert names_in(outer) == set()


def test_latents_that_are_gone_cannot_be_decoded_again(
    client: DecodeClient, worker: StoreWorker, sweeper: BlobSweeper, admin: Any
) -> None:
    job = client.submit(LATENTS, vae="sd")
    worker.fail(worker.claim_one())
    admin.zadd(keys.external(latents_of(job).store), {latents_of(job).name: 1})
    sweeper.sweep()
    with pytest.raises(ResultExpired):
        job.redecode(output="webp")


def test_ending_a_job_does_not_bring_back_a_blob_that_was_doomed_before(
    client: DecodeClient, worker: StoreWorker, store: JobStore, sweeper: BlobSweeper, admin: Any
) -> None:
    """The clock has ended the retention of both jobs, their latents are deleted, and one of the jobs is retired."""
    first = client.submit(LATENTS, vae="sd")
    worker.fail(worker.claim_one())
    second = first.redecode(output="webp")
    worker.fail(worker.claim_one())
    latents = latents_of(first)
    end_retention(admin, first, second)
    assert sweeper.sweep() == 1
    assert store.retire(first.id) == 1
    with pytest.raises(ResultExpired):
        second.redecode(output="jpg")
    assert admin.exists(keys.external(latents.store), keys.doomed(latents.store)) == 0


def test_a_doomed_blob_lies_there_until_a_broker_that_lost_its_last_second_would_be_back(
    client: DecodeClient, worker: StoreWorker, tiers: TieredBlobStore, outer: ExternalStore, admin: Any
) -> None:
    job = client.submit(LATENTS, vae="sd")
    latents = latents_of(job)
    worker.fail(worker.claim_one())
    job.ack()
    patient = BlobSweeper(tiers, settle_s=600.0)
    assert patient.sweep() == 0
    assert names_in(outer) == {latents.name}
    assert admin.zcard(keys.external(latents.store)) == 0
    (doomed_ms,) = (score for _, score in admin.zrange(keys.doomed(latents.store), 0, -1, withscores=True))
    admin.zadd(keys.doomed(latents.store), {latents.name: doomed_ms - 601_000})
    assert patient.sweep() == 1
    assert names_in(outer) == set()


# Replays -----------------------------------------------------------------------------------------------------


def test_a_replay_is_the_same_job_and_stores_nothing_again(
    client: DecodeClient, sweeper: BlobSweeper, outer: ExternalStore
) -> None:
    job = client.submit(LATENTS, vae="sd", job_id="once")
    client.submit(LATENTS, vae="sd", job_id="once")
    assert sweeper.sweep() == 0
    assert names_in(outer) == {latents_of(job).name}


def test_what_two_clients_stored_at_once_for_one_job_goes_but_for_one(
    client: DecodeClient, connections: Connections, settings: Settings, sweeper: BlobSweeper, outer: ExternalStore
) -> None:
    other = DecodeClient(connections, settings=settings)
    BeforeSubmit(client, lambda _: other.submit(LATENTS, vae="sd", job_id="once"))
    job = client.submit(LATENTS, vae="sd", job_id="once")
    assert len(names_in(outer)) == 2
    assert sweeper.sweep() == 1
    assert names_in(outer) == {latents_of(job).name}


def test_a_replay_by_a_client_that_stores_elsewhere_is_the_same_job(
    client: DecodeClient, connections: Connections, settings: Settings, outer: ExternalStore
) -> None:
    job = client.submit(LATENTS, vae="sd", job_id="once")
    elsewhere = DecodeClient(connections, settings=settings.model_copy(update={"blob_store": None}))
    assert elsewhere.submit(LATENTS, vae="sd", job_id="once").id == "once"
    assert names_in(outer) == {latents_of(job).name}


def test_what_a_conflicting_submit_stored_goes(
    client: DecodeClient, sweeper: BlobSweeper, outer: ExternalStore
) -> None:
    job = client.submit(LATENTS, vae="sd", job_id="once")
    with pytest.raises(JobConflict):
        client.submit(LATENTS + 1, vae="sd", job_id="once")
    sweeper.sweep()
    assert names_in(outer) == {latents_of(job).name}


def test_what_a_producer_stored_before_it_died_goes(
    tiers: TieredBlobStore, sweeper: BlobSweeper, outer: ExternalStore, admin: Any
) -> None:
    ref = tiers.put("orphan", PICTURE)
    assert sweeper.sweep() == 0
    lapse(admin, ref)
    assert sweeper.sweep() == 1
    assert names_in(outer) == set()


def test_what_was_reserved_and_never_written_goes(tiers: TieredBlobStore, sweeper: BlobSweeper, admin: Any) -> None:
    opened = tiers.external()
    assert opened is not None
    tiers.index.reserve(opened.id, "never-written", lifetime_s=60)
    admin.zadd(keys.external(opened.id), {"never-written": 1})
    assert sweeper.sweep() == 1
    assert admin.exists(keys.external(opened.id), keys.doomed(opened.id)) == 0


# Submit and deletion at the same time ------------------------------------------------------------------------


def test_a_slow_submit_whose_latents_were_collected_stores_them_again(
    client: DecodeClient, worker: StoreWorker, sweeper: BlobSweeper, outer: ExternalStore, admin: Any
) -> None:
    def collect(request: DecodeRequest) -> None:
        lapse(admin, request.latents)
        assert sweeper.sweep() == 1

    between = BeforeSubmit(client, collect)
    job = client.submit(LATENTS, vae="sd")
    first, second = between.requests
    assert first.latents.name != second.latents.name
    assert first.payload_hash == second.payload_hash
    assert latents_of(job) == second.latents
    assert names_in(outer) == {second.latents.name}
    assert worker.blobs.get(worker.request(worker.claim_one()).latents)


def test_a_deletion_that_was_decided_before_a_submit_and_happens_after_it_takes_nothing_from_the_job(
    client: DecodeClient, tiers: TieredBlobStore, sweeper: BlobSweeper, outer: ExternalStore, admin: Any
) -> None:
    """A janitor that is stopped between the decision and the deletion, for as long as you like."""
    opened = tiers.external()
    assert opened is not None
    decided: list[str] = []

    def decide(request: DecodeRequest) -> None:
        lapse(admin, request.latents)
        decided.extend(tiers.index.doomed(opened.id, settle_s=0, limit=10))
        sweeper.sweep()  # another janitor is done with it long before

    BeforeSubmit(client, decide)
    job = client.submit(LATENTS, vae="sd", job_id="again")
    outer.delete(decided)
    tiers.index.forget(opened.id, decided)
    assert len(decided) == 1
    assert len(tiers.get(latents_of(job))) == latents_of(job).size_bytes
    sweeper.sweep()
    sweeper.walk()
    assert names_in(outer) == {latents_of(job).name}


def test_a_submit_that_comes_before_the_decision_keeps_its_latents(
    client: DecodeClient, sweeper: BlobSweeper, outer: ExternalStore, admin: Any
) -> None:
    BeforeSubmit(client, lambda request: lapse(admin, request.latents))  # due, but nobody has looked
    job = client.submit(LATENTS, vae="sd")
    assert sweeper.sweep() == 0
    assert names_in(outer) == {latents_of(job).name}


def test_an_artifact_that_was_collected_before_the_job_completed_is_asked_for_again(
    client: DecodeClient, worker: StoreWorker, store: JobStore, sweeper: BlobSweeper, admin: Any
) -> None:
    job = client.submit(LATENTS, vae="sd")
    claim = worker.claim_one()
    result = worker.result(claim, data=PICTURE)
    lapse(admin, result.artifacts[0].blob)
    sweeper.sweep()
    assert store.complete(claim, result) is Outcome.ARTIFACT_MISSING
    assert job.status() is JobStatus.PROCESSING
    again = worker.result(claim, data=PICTURE)
    assert store.complete(claim, again) is Outcome.COMPLETED
    assert [data for _, data in job.artifacts()] == [PICTURE]


def test_what_a_lost_attempt_stored_goes(
    client: DecodeClient,
    worker: StoreWorker,
    store: JobStore,
    tiers: TieredBlobStore,
    sweeper: BlobSweeper,
    outer: ExternalStore,
    admin: Any,
) -> None:
    job = client.submit(LATENTS, vae="sd")
    late = worker.claim_one()
    store.release([late])
    winner = worker.claim_one()
    lost, kept = worker.result(late, data=PICTURE), worker.result(winner, data=PICTURE)
    assert store.complete(winner, kept) is Outcome.COMPLETED
    assert store.complete(late, lost) is Outcome.LOST
    lapse(admin, lost.artifacts[0].blob)
    assert sweeper.sweep() == 1
    assert names_in(outer) == {latents_of(job).name, kept.artifacts[0].blob.name}


def test_a_reservation_that_is_repeated_after_it_has_lapsed_is_refused(
    tiers: TieredBlobStore, connections: Connections, admin: Any
) -> None:
    """A command that the network held back for longer than the blob's lifetime."""
    opened = tiers.external()
    assert opened is not None
    script = tiers.index._run
    assert script("reserve", opened.id, "name", 1) == b"late"
    with pytest.raises(BlobStoreUnavailable, match="too late"):
        tiers.index.reserve(opened.id, "name", lifetime_s=-1)
    assert admin.zcard(keys.external(opened.id)) == 0


def test_a_full_queue_refuses_large_latents_before_they_are_sent(
    connections: Connections, settings: Settings, outer: ExternalStore, admin: Any
) -> None:
    client = DecodeClient(connections, settings=settings.model_copy(update={"max_pending_bytes": 1}))
    with pytest.raises(QueueFull) as caught:
        client.submit(LATENTS, vae="sd")
    assert caught.value.job_id
    assert names_in(outer) == set()
    assert admin.keys("latentq:*") == []


def test_a_queue_that_fills_meanwhile_does_not_shorten_the_life_of_a_reservation(
    connections: Connections, settings: Settings, tiers: TieredBlobStore, admin: Any
) -> None:
    first = DecodeClient(connections, settings=settings)
    client = DecodeClient(connections, settings=settings.model_copy(update={"max_pending_jobs": 1}))
    BeforeSubmit(client, lambda _: first.submit(LATENTS[:, :, :4, :4].copy(), vae="sd"))
    with pytest.raises(QueueFull):
        client.submit(LATENTS, vae="sd")
    opened = tiers.external()
    assert opened is not None
    ((_, until_ms),) = admin.zrange(keys.external(opened.id), 0, -1, withscores=True)
    assert until_ms - client.store.now_ms() > (settings.provisional_s - 60) * 1000


# What the queue counts ---------------------------------------------------------------------------------------


def test_artifacts_that_will_not_lie_in_the_broker_take_no_room_there(
    client: DecodeClient, admin: Any, settings: Settings
) -> None:
    client.submit(np.zeros((2, 4, 64, 64), np.float32), vae="sd", output="tensor")
    assert int(admin.hget(keys.TOTALS, "reserved_bytes") or 0) == 2 * settings.blob_threshold_bytes


def complete_with(store: JobStore, claim: Claim, ref: BlobRef) -> Outcome:
    """Completes a job with one artifact."""
    artifact = Artifact(blob=ref, content_type="image/png", extension="png")
    return store.complete(claim, DecodeResult(artifacts=(artifact,), timings_s={}, decoded_by={}))


def test_a_result_cannot_point_to_a_blob_that_nobody_announced(
    client: DecodeClient, worker: StoreWorker, store: JobStore
) -> None:
    client.submit(LATENTS, vae="sd")
    ref = BlobRef(store="0" * 32, name="x", sha256="0" * 64, size_bytes=1)
    assert complete_with(store, worker.claim_one(), ref) is Outcome.ARTIFACT_MISSING
