"""Any order of what producers, jobs and janitors do: an accepted job's latents are there, and nothing is left over.

Every step that is atomic in reality (one script, one write, one deletion) is one rule; a janitor may be stopped between
the decision and the deletion, and between the deletion and forgetting it, for as long as the run lasts. Time passes by
the rule `lapse`.
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from broker_config import keys
from broker_config.errors import BlobMissing
from broker_config.external_index import ExternalIndex
from broker_config.file_store import FileStore
from broker_config.job_store import JobStore
from broker_config.messages import BlobRef, DecodeRequest, Output
from broker_config.settings import Settings
from broker_config.tiered_blob_store import TieredBlobStore
from tests.support.external_stores import names_in
from worker.blob_sweeper import BlobSweeper

_serial = itertools.count()


def contents(name: str) -> bytes:
    """What lies under a name, when it lies there."""
    return f"latents of {name} ".encode() * 10


def request_for(job_id: str, ref: BlobRef) -> DecodeRequest:
    """A job with these latents."""
    return DecodeRequest(
        job_id=job_id, vae="sd", layout="unpacked", latents=ref, shape=(1, 4, 8, 8), dtype="float32", height=64,
        width=64, batch=1, num_frames=1, fps=16.0, output=Output.PNG,
    )  # fmt: skip


class BlobLives(RuleBasedStateMachine):
    """Producers, jobs and janitors of one broker and one folder."""

    def __init__(self, store: JobStore, tiers: TieredBlobStore, admin: Any) -> None:
        super().__init__()
        opened = tiers.external()
        assert opened is not None
        self.jobs, self.index, self.admin = store, ExternalIndex(store.connections), admin
        self.tiers, self.files, self.store_id = tiers, opened.store, opened.id
        #: Names that producers hold: reserved, then written.
        self.reserved: list[str] = []
        self.written: list[str] = []
        #: Jobs that have not ended, that are retained, and whose retention is over, though nobody retired them yet.
        self.alive: dict[str, BlobRef] = {}
        self.ended: dict[str, BlobRef] = {}
        self.over: dict[str, BlobRef] = {}
        #: What janitors have decided and not deleted, deleted and not forgotten.
        self.decided: list[list[str]] = []
        self.deleted: list[list[str]] = []

    # Producers ------------------------------------------------------------------------------------------

    @rule()
    def reserve(self) -> None:
        name = f"blob-{next(_serial)}"
        self.index.reserve(self.store_id, name, lifetime_s=3600)
        self.reserved.append(name)

    @precondition(lambda self: self.reserved)
    @rule(pick=st.randoms(use_true_random=False))
    def write(self, pick: Any) -> None:
        name = self.reserved.pop(pick.randrange(len(self.reserved)))
        self.files.write(name, contents(name))
        self.written.append(name)

    @precondition(lambda self: self.written)
    @rule(pick=st.randoms(use_true_random=False))
    def submit(self, pick: Any) -> None:
        name = pick.choice(self.written)
        data = contents(name)
        ref = BlobRef(store=self.store_id, name=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
        self._submit(ref)

    @precondition(lambda self: self.alive or self.ended or self.over)
    @rule(pick=st.randoms(use_true_random=False))
    def redecode(self, pick: Any) -> None:
        self._submit(pick.choice(list((self.alive | self.ended | self.over).values())))

    def _submit(self, ref: BlobRef) -> None:
        job_id = f"job-{next(_serial)}"
        try:
            assert self.jobs.submit(request_for(job_id, ref))
        except BlobMissing:
            return  # the producer stores it again, under another name
        self.alive[job_id] = ref

    @rule()
    def lapse(self) -> None:
        """The provisional lifetime of everything that nobody owns ends."""
        key = keys.external(self.store_id)
        for name, until_ms in self.admin.zrange(key, 0, -1, withscores=True):
            if until_ms != float("inf") and not self.admin.exists(keys.owners(f"{self.store_id}/{name.decode()}")):
                self.admin.zadd(key, {name: 1})

    # Jobs -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.alive)
    @rule(pick=st.randoms(use_true_random=False))
    def end(self, pick: Any) -> None:
        job_id = pick.choice(list(self.alive))
        assert self.jobs.cancel(job_id) == "canceled"
        self.ended[job_id] = self.alive.pop(job_id)

    @precondition(lambda self: self.ended)
    @rule(pick=st.randoms(use_true_random=False))
    def end_retention(self, pick: Any) -> None:
        """By the clock alone: an owners' key without a later owner expires by itself."""
        job_id = pick.choice(list(self.ended))
        ref = self.over[job_id] = self.ended.pop(job_id)
        owners = keys.owners(f"{ref.store}/{ref.name}")
        self.admin.zadd(owners, {job_id: 1}, xx=True)
        ((_, last),) = self.admin.zrange(owners, 0, 0, desc=True, withscores=True)
        if last == 1:
            self.admin.delete(owners)
            self.admin.zadd(keys.external(ref.store), {ref.name: 1}, xx=True)

    @precondition(lambda self: self.ended or self.over)
    @rule(pick=st.randoms(use_true_random=False))
    def retire(self, pick: Any) -> None:
        job_id = pick.choice([*self.ended, *self.over])
        assert self.jobs.retire(job_id) == 1
        self.ended.pop(job_id, None)
        self.over.pop(job_id, None)

    # Janitors -------------------------------------------------------------------------------------------

    @rule(limit=st.integers(1, 3))
    def decide(self, limit: int) -> None:
        self.decided.append(self.index.doomed(self.store_id, settle_s=0, limit=limit))

    @rule()
    def walk(self) -> None:
        self.index.doom_strays(self.store_id, [*sorted(names_in(self.files)), "no-such-blob"])

    @precondition(lambda self: self.decided)
    @rule(pick=st.randoms(use_true_random=False))
    def delete(self, pick: Any) -> None:
        names = self.decided.pop(pick.randrange(len(self.decided)))
        self.files.delete(names)
        if names:
            self.deleted.append(names)

    @precondition(lambda self: self.deleted)
    @rule(pick=st.randoms(use_true_random=False))
    def forget(self, pick: Any) -> None:
        self.index.forget(self.store_id, self.deleted.pop(pick.randrange(len(self.deleted))))

    @precondition(lambda self: self.decided)
    @rule()
    def kill_janitors(self) -> None:
        """What they had decided and not done stays on the list."""
        self.decided.clear()
        self.deleted.clear()

    # Promises -------------------------------------------------------------------------------------------

    @invariant()
    def latents_of_every_job_are_there(self) -> None:
        for ref in (self.alive | self.ended).values():
            assert self.files.read(ref.name) == contents(ref.name)

    def teardown(self) -> None:
        """Once everything has had its time, what is left is what jobs own."""
        self.lapse()
        sweeper = BlobSweeper(self.tiers, settle_s=0.0, stray_age_s=-60)
        sweeper.sweep()
        sweeper.walk()
        sweeper.sweep()
        self.latents_of_every_job_are_there()
        owned = {ref.name for ref in (self.alive | self.ended).values()}
        assert names_in(self.files) == owned
        for job_id in list(self.alive):
            self.jobs.cancel(job_id)
        for job_id in [*self.alive, *self.ended, *self.over]:
            self.jobs.retire(job_id)
        sweeper.sweep()
        assert names_in(self.files) == set()
        assert self.admin.exists(keys.external(self.store_id), keys.doomed(self.store_id)) == 0


@pytest.mark.slow
def test_no_interleaving_loses_latents_or_leaves_any_behind(
    broker_url: str, connections: Any, settings: Settings, file_place: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings.model_copy(update=file_place)
    tiers = TieredBlobStore(connections, settings)
    store = JobStore(connections, settings)
    tiers.verify()
    assert isinstance(tiers.external().store, FileStore)  # type: ignore[union-attr]
    with redis.Redis.from_url(broker_url) as admin:
        run_state_machine_as_test(
            lambda: BlobLives(store, tiers, admin),  # type: ignore[arg-type]  # it is called, like a type
            settings=hypothesis_settings(
                max_examples=60,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    tiers.close()


@pytest.fixture
def place(file_place: dict[str, Any]) -> dict[str, Any]:
    """In a folder."""
    return file_place
