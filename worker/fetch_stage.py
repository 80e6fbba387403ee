"""The first stage: claim a batch, read its latents, make sure its VAE is loaded."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Final
from uuid import uuid4

from broker_config.blob_store import BlobStore, checked_or_error
from broker_config.claims import Claim
from broker_config.errors import (
    BlobError,
    BlobStoreUnknown,
    BrokerError,
    LatentqError,
    OutOfMemory,
    UnsupportedMessage,
)
from broker_config.job_store import JobStore
from broker_config.messages import DecodeRequest
from worker import handlers
from worker.attempts import AttemptReporter
from worker.latent_io import read_latents
from worker.leases import LeaseKeeper
from worker.memory_ladder import make_room, synchronize
from worker.next_claim import NextClaim
from worker.settings import WorkerSettings
from worker.stages import Abandoned, Patience, Timer, Work, failure_of
from worker.vae_pool import LoadedVae, VaePool
from worker.warm_up import USUAL_BUDGET_PX

logger = logging.getLogger(__name__)

#: Pause while the broker does not answer.
_OUTAGE_PAUSE_S: Final = 1.0
#: Reading latents and loading a VAE, the first time from a slow disk or the hub.
_FETCH_LIMIT_S: Final = 900.0
#: A VAE that could not be loaded is not served for so long; twice as long each time.
_REST_FIRST_S: Final = 15.0
_REST_LONGEST_S: Final = 600.0

Batch = tuple[LoadedVae, list[Work]]


class FetchStage:
    """Claims batches and makes them ready. `run` is the thread's body."""

    def __init__(
        self,
        store: JobStore,
        blobs: BlobStore,
        pool: VaePool,
        *,
        settings: WorkerSettings,
        leases: LeaseKeeper,
        reporter: AttemptReporter,
        patience: Patience,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._pool = pool
        self._settings = settings
        self._leases = leases
        self._reporter = reporter
        self._patience = patience
        self._max_px: dict[str, int] = {}
        #: VAEs that could not be loaded: until when (`time.monotonic()`) they rest, and for how long this time.
        self._resting: dict[str, tuple[float, float]] = {}
        self._stopping = threading.Event()
        #: When the next batch is claimed; for the device's stage.
        self.next_claim = NextClaim(may_load=lambda: not set(self.served()) <= set(self._pool.loaded()))
        #: Batches ready for the device: at most one waits, and the end behind it. Room for both, so that this thread
        #: ends even where the device's thread broke and takes neither.
        self.ready: queue.Queue[Batch | None] = queue.Queue(maxsize=2)

    def serve(self, settings: WorkerSettings, *, budgets_px: Mapping[str, int]) -> None:
        """Takes over which VAEs are served, and how many pixels are worth one call of each, before `run`."""
        self._settings = settings
        for vae in settings.vaes:
            self._max_px[vae] = settings.max_batch_px or budgets_px.get(vae, USUAL_BUDGET_PX)

    def served(self) -> tuple[str, ...]:
        """VAEs whose jobs are claimed now: without those that could not be loaded a moment ago."""
        now = time.monotonic()
        return tuple(vae for vae in self._settings.vaes if self._resting.get(vae, (0.0, 0.0))[0] <= now)

    def stop(self) -> None:
        """Claims nothing more. Safe from a signal handler."""
        self._stopping.set()

    def run(self) -> None:
        """Claims and prepares until stopped, then says so with a None."""
        try:
            while not self._stopping.is_set():
                if not self.next_claim.wait(0.1):
                    continue
                batch = self._next()
                if batch is None:
                    break
                self.ready.put(batch)
        finally:
            self.ready.put(None)

    def _next(self) -> Batch | None:
        """The next batch that has anything left to decode; None when stopping."""
        while not self._stopping.is_set():
            claims = self._claim()
            if claims is None:
                return None
            try:
                with Timer() as timer:
                    batch = self._prepare(claims)
            except Abandoned:
                return None
            if batch is not None:
                self.next_claim.prepared(timer.s)
                return batch
        return None

    def _claim(self) -> list[Claim] | None:
        """Blocks until something is claimed; None when stopping."""
        settings = self._settings
        assert settings.mode is not None
        mode = settings.mode
        while not self._stopping.is_set():
            token, vaes = uuid4().hex, self.served()
            if not vaes:
                self._stopping.wait(_OUTAGE_PAUSE_S)
                continue

            def claim(token: str = token, vaes: tuple[str, ...] = vaes) -> list[Claim]:
                self._leases.catch_up()
                return self._store.claim(
                    token=token,
                    worker=settings.name,
                    vaes=vaes,
                    default_mode=mode,
                    max_jobs=settings.max_batch_jobs,
                    max_px=self._max_px,
                )

            try:
                claims = self._patience.repeat(claim)
                if claims:
                    self._leases.hold(claims, limit_s=_FETCH_LIMIT_S)
                    return claims
                self._store.wait_for_work(vaes)
            except BrokerError as error:
                logger.warning("waiting for work failed: %s", error, extra={"action": "broker_away"})
                self._stopping.wait(_OUTAGE_PAUSE_S)
            except Abandoned:
                return None
        return None

    def _prepare(self, claims: Sequence[Claim]) -> Batch | None:
        """Works of these claims, which share a VAE; those that cannot be prepared end here."""
        works = self._read(claims)
        if not works:
            return None
        claims = [work.claim for work in works]
        with Timer() as timer:
            vae = self._loaded(works[0].request.vae)
        if vae is None:
            self._reporter.release(claims)  # unmarked: it is not the jobs' fault, and another worker may have it
            return None
        try:
            for work in works:
                work.timings_s["load"] = timer.s
                if vae.device.type == "cuda":
                    work.latents = work.latents.pin_memory()
        except Exception as error:
            failure = failure_of(error)
            synchronize(vae.device)  # raises where the device is lost: the process ends, and the jobs go back
            for claim in claims:
                self._reporter.fail(claim, failure, stage="fetch")
            return None
        self._leases.enter(claims, "ready")
        return vae, works

    def _loaded(self, name: str) -> LoadedVae | None:
        """The VAE; None if it cannot be loaded now: then it rests, and the worker says that it does not serve it."""
        found = self._try_load(name)
        if isinstance(found, OutOfMemory) and make_room(
            self._pool.device, evict=lambda: self._pool.evict_all_but(name)
        ):
            found = self._try_load(name)  # once more, now that the others made room
        if isinstance(found, LoadedVae):
            self._resting.pop(name, None)
            return found
        synchronize(self._pool.device)  # raises where the device is lost: only another process can load anything
        rest_s = min(_REST_LONGEST_S, 2 * self._resting.get(name, (0.0, _REST_FIRST_S / 2))[1])
        self._resting[name] = (time.monotonic() + rest_s, rest_s)
        logger.error(
            "VAE %s cannot be loaded, its jobs go back for %.0f s: %s",
            name,
            rest_s,
            found,
            extra={"action": "vae_rests", "vae": name},
        )
        return None

    def _try_load(self, name: str) -> LoadedVae | LatentqError:
        """The VAE, or what went wrong, without the frames that hold the part of it that was loaded."""
        try:
            return self._pool.get(name)
        except Exception as error:
            return failure_of(error).error

    def _read(self, claims: Sequence[Claim]) -> list[Work]:
        """Works of these claims, their latents read in one round trip; a job whose latents are unusable ends here."""
        asked: list[tuple[Claim, DecodeRequest]] = []
        for claim in claims:
            try:
                request = DecodeRequest.from_wire(claim.message)
                if handlers.kind_of(claim.rq_data) != request.kind:
                    raise UnsupportedMessage(f"the job's function is not that of a message of kind {request.kind}")
                asked.append((claim, request))
            except Exception as error:
                self._reporter.fail(claim, failure_of(error), stage="fetch")
        with Timer() as timer:
            found = self._latents_of(asked)
        works: list[Work] = []
        for (claim, request), data in zip(asked, found, strict=True):
            if isinstance(data, BlobStoreUnknown):  # set up since this worker started: not the job's fault
                raise data
            try:
                latents = read_latents(_usable(data), shape=request.shape, dtype=request.dtype)
            except Exception as error:
                self._reporter.fail(claim, failure_of(error), stage="fetch")
                continue
            works.append(Work(claim=claim, request=request, latents=latents, timings_s={"fetch": timer.s}))
        return works

    def _latents_of(self, asked: Sequence[tuple[Claim, DecodeRequest]]) -> list[bytes | BlobError]:
        """Bytes that came along with the claims, and the others, in one round trip."""
        refs = [request.latents for claim, request in asked if claim.latents is None]
        fetched = iter(self._patience.repeat(lambda: self._blobs.get_many(refs)) if refs else ())
        return [
            next(fetched) if claim.latents is None else checked_or_error(request.latents, claim.latents)
            for claim, request in asked
        ]


def _usable(data: bytes | BlobError) -> bytes:
    if isinstance(data, BlobError):
        raise data
    return data
