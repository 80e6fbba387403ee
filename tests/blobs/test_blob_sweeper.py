"""The janitor's part: what is doomed goes, whatever kills the janitor, and what is on no list goes when it is old."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest

from broker_config import keys
from broker_config.errors import BlobStoreUnavailable
from broker_config.external_store import ExternalStore
from broker_config.messages import DecodeRequest
from broker_config.tiered_blob_store import TieredBlobStore
from producer import DecodeClient
from tests.support.external_stores import BeforeSubmit, lapse, latents_of, names_in
from tests.support.store_worker import StoreWorker
from worker.blob_sweeper import BlobSweeper

#: 4 kB, with a threshold of 1 kB.
LATENTS: Final = np.random.default_rng(7).standard_normal((1, 4, 16, 16)).astype(np.float32)
PICTURE: Final = b"picture" * 1000


@pytest.fixture
def place(file_place: dict[str, Any]) -> dict[str, Any]:
    """In a folder."""
    return file_place


# The janitor's own crashes -----------------------------------------------------------------------------------


def test_a_janitor_killed_between_decision_and_deletion_leaves_it_to_the_next(
    client: DecodeClient, worker: StoreWorker, tiers: TieredBlobStore, sweeper: BlobSweeper, outer: ExternalStore
) -> None:
    job = client.submit(LATENTS, vae="sd")
    worker.fail(worker.claim_one())
    opened = tiers.external()
    assert opened is not None
    job.ack()
    doomed = tiers.index.doomed(opened.id, settle_s=0, limit=10)
    assert names_in(outer) == set(doomed)
    assert sweeper.sweep() == 1
    assert names_in(outer) == set()


def test_a_janitor_killed_between_deletion_and_forgetting_leaves_it_to_the_next(
    client: DecodeClient,
    worker: StoreWorker,
    tiers: TieredBlobStore,
    sweeper: BlobSweeper,
    outer: ExternalStore,
    admin: Any,
) -> None:
    job = client.submit(LATENTS, vae="sd")
    worker.fail(worker.claim_one())
    opened = tiers.external()
    assert opened is not None
    job.ack()
    outer.delete(tiers.index.doomed(opened.id, settle_s=0, limit=10))
    assert sweeper.sweep() == 1
    assert admin.zcard(keys.doomed(opened.id)) == 0


class StubbornStore:
    """A store that does not delete some blobs."""

    def __init__(self, store: ExternalStore, stubborn: set[str]) -> None:
        self._store = store
        self._stubborn = stubborn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, names: Any) -> None:
        """Deletes, but for the stubborn."""
        if self._stubborn & set(names):
            raise BlobStoreUnavailable("this one is stubborn")
        self._store.delete(names)


def test_a_blob_that_cannot_be_deleted_does_not_keep_the_others(
    tiers: TieredBlobStore,
    sweeper: BlobSweeper,
    outer: ExternalStore,
    admin: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refs = [tiers.put(f"orphan{number}", PICTURE) for number in range(5)]
    for ref in refs:
        lapse(admin, ref)
    opened = tiers.external()
    assert opened is not None
    stubborn = type(opened)(id=opened.id, store=StubbornStore(opened.store, {refs[0].name}))
    monkeypatch.setattr(tiers, "external", lambda: stubborn)
    assert sweeper.sweep() == 4
    assert names_in(outer) == {refs[0].name}
    assert admin.zrange(keys.doomed(opened.id), 0, -1) == [refs[0].name.encode()]

    monkeypatch.undo()
    assert sweeper.sweep() == 0  # it waits for its next turn
    admin.zadd(keys.doomed(opened.id), {refs[0].name: 1})
    assert sweeper.sweep() == 1


def test_a_store_that_deletes_nothing_ends_the_round_and_everything_stays_on_the_list(
    tiers: TieredBlobStore, sweeper: BlobSweeper, admin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [tiers.put(f"orphan{number}", PICTURE) for number in range(5)]
    for ref in refs:
        lapse(admin, ref)
    opened = tiers.external()
    assert opened is not None
    stubborn = type(opened)(
        id=opened.id,
        store=StubbornStore(opened.store, {ref.name for ref in refs}),
    )
    monkeypatch.setattr(tiers, "external", lambda: stubborn)
    with pytest.raises(BlobStoreUnavailable, match="stubborn"):
        sweeper.sweep()
    assert admin.zcard(keys.doomed(opened.id)) == 5


# Blobs on no list --------------------------------------------------------------------------------------------


def test_what_is_on_no_list_goes_when_it_is_old_and_what_is_on_one_stays(
    client: DecodeClient, tiers: TieredBlobStore, outer: ExternalStore
) -> None:
    job = client.submit(LATENTS, vae="sd")
    reserved = tiers.put("about-to-be-owned", PICTURE)
    outer.write("stray.blob", PICTURE)  # a write that came through after its reservation had lapsed
    keep = {latents_of(job).name, reserved.name}
    patient = BlobSweeper(tiers, settle_s=0.0, stray_age_s=3600)
    assert patient.walk() == 0
    assert patient.sweep() == 0
    assert names_in(outer) == keep | {"stray.blob"}
    eager = BlobSweeper(tiers, settle_s=0.0, stray_age_s=-60)
    assert eager.walk() == 1
    assert eager.walk() == 0
    assert eager.sweep() == 1
    assert names_in(outer) == keep


def test_a_walk_doomed_blob_can_never_be_owned_again(
    client: DecodeClient, tiers: TieredBlobStore, outer: ExternalStore, admin: Any
) -> None:
    """However old: a submit whose reservation has lapsed is refused, whether or not the blob is still there."""
    seen: list[DecodeRequest] = []

    def lose_entry(request: DecodeRequest) -> None:
        seen.append(request)
        admin.zrem(keys.external(request.latents.store), request.latents.name)

    BeforeSubmit(client, lose_entry)
    job = client.submit(LATENTS, vae="sd")
    assert names_in(outer) == {seen[0].latents.name, latents_of(job).name}
    sweeper = BlobSweeper(tiers, settle_s=0.0, stray_age_s=-60)
    assert sweeper.walk() == 1
    sweeper.sweep()
    assert names_in(outer) == {latents_of(job).name}


def test_a_walk_goes_through_more_blobs_than_fit_in_one_script(tiers: TieredBlobStore, outer: ExternalStore) -> None:
    tiers.verify()
    for number in range(450):
        outer.write(f"stray.{number}", b"x")
    sweeper = BlobSweeper(tiers, settle_s=0.0, stray_age_s=-60)
    assert sweeper.walk() == 450
    assert sweeper.sweep() == 450
    assert names_in(outer) == set()
