"""The first stage: claim a batch, read its latents, make sure its VAE is loaded."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Final
from uuid import uuid4

from broker_config.blob_store import BlobStore
from broker_config.errors import BlobError, BlobStoreUnknown, BrokerError, UnsupportedMessage
from broker_config.job_store import Claim, JobStore
from broker_config.messages import DecodeRequest
from worker import handlers
from worker.attempts import AttemptReporter
from worker.latent_io import read_latents
from worker.leases import LeaseKeeper
from worker.settings import WorkerSettings
from worker.stages import Abandoned, Patience, Timer, Work, failure_of
from worker.vae_pool import LoadedVae, VaePool
from worker.warm_up import USUAL_BUDGET_PX

logger = logging.getLogger(__name__)

#: Pause while the broker does not answer.
_OUTAGE_PAUSE_S: Final = 1.0
#: Reading latents and loading a VAE, the first time from a slow disk or the hub.
_FETCH_LIMIT_S: Final = 900.0

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
        self._stopping = threading.Event()
        self._paused_claims = threading.Semaphore(1)
        #: Batches ready for the device; at most one waits.
        self.ready: queue.Queue[Batch | None] = queue.Queue(maxsize=1)

    def serve(self, settings: WorkerSettings, *, budgets_px: Mapping[str, int]) -> None:
        """Takes over which VAEs are served, and how many pixels are worth one call of each, before `run`."""
        self._settings = settings
        for vae in settings.vaes:
            self._max_px[vae] = settings.max_batch_px or budgets_px.get(vae, USUAL_BUDGET_PX)

    def stop(self) -> None:
        """Claims nothing more. Safe from a signal handler."""
        self._stopping.set()

    def taken(self) -> None:
        """The device took the ready batch: the next one may be claimed."""
        self._paused_claims.release()

    def run(self) -> None:
        """Claims and prepares until stopped, then says so with a None."""
        try:
            while not self._stopping.is_set():
                if not self._paused_claims.acquire(timeout=0.1):
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
                batch = self._prepare(claims)
            except Abandoned:
                return None
            if batch is not None:
                return batch
        return None

    def _claim(self) -> list[Claim] | None:
        """Blocks until something is claimed; None when stopping."""
        settings = self._settings
        assert settings.mode is not None
        mode = settings.mode
        while not self._stopping.is_set():
            token = uuid4().hex

            def claim(token: str = token) -> list[Claim]:
                self._leases.catch_up()
                return self._store.claim(
                    token=token,
                    worker=settings.name,
                    vaes=settings.vaes,
                    default_mode=mode,
                    max_jobs=settings.max_batch_jobs,
                    max_px=self._max_px,
                )

            try:
                claims = self._patience.repeat(claim)
                if claims:
                    self._leases.hold(claims, limit_s=_FETCH_LIMIT_S)
                    return claims
                self._store.wait_for_work(settings.vaes)
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
        try:
            with Timer() as timer:
                vae = self._pool.get(works[0].request.vae)
        except Exception as error:
            failure = failure_of(error)
            for work in works:
                self._reporter.fail(work.claim, failure, stage="fetch")
            return None
        for work in works:
            work.timings_s["load"] = timer.s
            if vae.device.type == "cuda":
                work.latents = work.latents.pin_memory()
        return vae, works

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
            refs = [request.latents for _, request in asked]
            found = self._patience.repeat(lambda: self._blobs.get_many(refs)) if refs else []
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


def _usable(data: bytes | BlobError) -> bytes:
    if isinstance(data, BlobError):
        raise data
    return data
