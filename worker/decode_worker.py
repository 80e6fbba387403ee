"""The worker: one process, one device, models that stay loaded.

DESIGN. The main thread only waits and watches; `fetch`, `device`, `leases` and the finish pool do the work
(`worker/stages.py`). Stopping (SIGTERM, SIGINT, RQ's `shutdown`): claim nothing more, decode what the device
holds, hand what was prefetched back, finish what was decoded, leave; past the grace period give up and let the
leases end. A hang (a stage past its deadline) and a broken stage end the process: only that frees a device, and
a supervisor starts a new one. SIGKILL at any line leaves leased jobs behind, which the janitor queues again, and
artifacts with a TTL.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Final

import torch

from broker_config import keys
from broker_config.claims import Claim
from broker_config.connection import Connections, broker_errors
from broker_config.errors import LatentqError
from broker_config.exit_status import EXIT_BROKEN
from broker_config.job_store import JobStore
from broker_config.messages import Mode
from broker_config.settings import Settings
from broker_config.tiered_blob_store import TieredBlobStore
from broker_config.vae_catalog import VaeCatalog
from worker.attempts import AttemptReporter
from worker.batch_decode import BatchDecoder
from worker.decode_probes import CostModels
from worker.decode_ways import fast_options
from worker.device_stage import DeviceStage
from worker.fast_path import FastVaes, keep_compiled_in
from worker.fetch_stage import FetchStage
from worker.finish_stage import FinishStage
from worker.leases import WAITING, LeaseKeeper
from worker.preview import Previewer
from worker.rq_adapter import RqPresence
from worker.settings import WorkerSettings
from worker.stages import Patience, Stopwatch
from worker.vae_pool import VaePool
from worker.warm_up import WarmUp

logger = logging.getLogger(__name__)

_WATCH_S: Final = 0.5


def pick_device(name: str) -> torch.device:
    """The device a setting names; `auto`: the first CUDA device, else the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


class DecodeWorker:
    """Decodes jobs until stopped."""

    def __init__(
        self,
        connections: Connections,
        *,
        settings: Settings,
        worker_settings: WorkerSettings,
        catalog: VaeCatalog,
    ) -> None:
        """Args:
        connections: the broker.
        settings: what both sides agree on.
        worker_settings: what only this worker needs; `vaes` must not be empty.
        catalog: the VAEs.

        Raises:
            BrokerUnreachable: the broker does not answer.
        """
        device = pick_device(worker_settings.device)
        if worker_settings.mode is None:
            mode = Mode.EXACT if device.type == "cpu" else Mode.FAST
            worker_settings = worker_settings.model_copy(update={"mode": mode})
        if worker_settings.threads is not None:
            torch.set_num_threads(worker_settings.threads)
        self._torch_device = device
        self._connections = connections
        self._settings = settings
        self._own = worker_settings
        self._catalog = catalog
        self._stop = threading.Event()
        #: Set when a stage broke; `_device_broke` when it was the device's.
        self._broken = threading.Event()
        self._device_broke = False
        self._patience = Patience(on_waited=lambda seconds: self._leases.grant(seconds, stages=WAITING))
        self.stopwatch = Stopwatch()
        self.store = JobStore(connections, settings)
        self.pool = VaePool(catalog, device=device, dtype=worker_settings.dtype, max_bytes=worker_settings.pool_bytes)
        with broker_errors(connections.url):  # RQ asks the broker for this connection's address
            self._presence = RqPresence(
                name=worker_settings.name,
                queues=[queue for vae in worker_settings.vaes for queue in keys.queue_names(vae)],
                connection=connections.commands,
                ttl_s=settings.lease_s * 3,
                on_stop_job=lambda job_id: self._leases.mark_canceled(job_id),
                on_shutdown=self.stop,
            )
        #: What decodes take here, fitted in warm-up; the planner chooses by it.
        self._costs = CostModels()
        self._fast = FastVaes(fast_options(worker_settings))
        self._wire_stages()

    def _wire_stages(self) -> None:
        own, settings = self._own, self._settings
        blobs = self._blobs = TieredBlobStore(self._connections, settings)
        self._leases = LeaseKeeper(
            self.store,
            worker=own.name,
            renew_s=settings.lease_renew_s,
            on_hang=self._hung,
            on_beat=self._beat,
        )
        reporter = AttemptReporter(self.store, blobs, leases=self._leases, patience=self._patience, worker=own.name)
        self._fetch = FetchStage(
            self.store,
            blobs,
            self.pool,
            settings=own,
            leases=self._leases,
            reporter=reporter,
            patience=self._patience,
        )
        self._finish = FinishStage(
            reporter=reporter,
            leases=self._leases,
            patience=self._patience,
            encode_threads=own.encode_threads,
        )
        self._device = DeviceStage(
            self._fetch.ready,
            next_claim=self._fetch.next_claim,
            decoder=BatchDecoder(
                hand_on=self._finish.accept,
                on_progress=lambda work, done, total: self._leases.progress(work.claim, done=done, total=total),
                default_mode=str(own.mode),
                fast=self._fast,
                # those before it have deadlines of their own
                on_waiting=lambda seconds: self._leases.grant(seconds, stages=("device",)),
            ),
            reporter=reporter,
            leases=self._leases,
            previewer=Previewer(self.pool, self.store, served=lambda: self._own.vaes),
            evict_others=self.pool.evict_all_but,
            stopwatch=self.stopwatch,
            costs=self._costs,
        )

    def stop(self) -> None:
        """Stops soon. Safe from any thread and from a signal handler."""
        self._stop.set()

    def run(self) -> int:
        """Works until stopped. Returns the exit status: 0, or 70 after a fault.

        Raises:
            WeightsMissing: none of the VAEs has weights here.
            WeightsMismatch: the weights that there are are not what the catalogue says.
            ConfigurationError: large blobs lie in a store that this worker does not reach.
            BrokerError: the broker, or the store of large blobs, does not answer at the start.
        """
        self._blobs.verify()
        self._load()
        with broker_errors(self._connections.url):
            self._presence.announce()
        self._patience.repeat(self._beat)
        self._leases.start()
        fetch = self._thread("fetch", self._fetch.run)
        device = self._thread("device", self._device.run)
        logger.info(
            "worker %s is ready: %s",
            self._own.name,
            ", ".join(self._own.vaes),
            extra={"action": "worker_ready", "worker": self._own.name},
        )
        while not self._stop.wait(_WATCH_S) and not self._broken.is_set():
            pass
        return self._wind_down(fetch, device)

    def install_signal_handlers(self) -> None:
        """SIGTERM and SIGINT stop the worker; only from the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def _load(self) -> None:
        """Loads the VAEs and warms them up, as many as the pool holds, before the worker says it is ready.

        VAEs without usable weights here are not served.
        """
        own, is_fast = self._own, self._own.mode is Mode.FAST
        if is_fast:
            keep_compiled_in(own.compile_cache)
        warm_up = WarmUp(
            calibrate=is_fast and own.max_batch_px is None,
            costs=self._costs,
            fast=self._fast if is_fast else None,
            compile_sizes=own.compile_sizes_px,
        )
        usable = warm_up.load(self._own.vaes, catalog=self._catalog, pool=self.pool)
        self._own = self._own.model_copy(update={"vaes": usable})
        self._fetch.serve(self._own, budgets_px=warm_up.budgets_px)

    def _beat(self) -> None:
        ttl_s = self._settings.lease_s * 2
        served = self._fetch.served()
        resting = set(self._own.vaes) - set(served)
        with broker_errors(self._connections.url):
            self._presence.beat()
            self._presence.show(busy=bool(self._leases.held()))
        report = self.stopwatch.report() | {
            "vaes": list(served),
            "device": str(self._torch_device),
            "pid": os.getpid(),
            "held": len(self._leases.held()),
        }
        self.store.serve(self._own.name, served, ttl_s=ttl_s, report=report, resting=sorted(resting))
        self.store.unpark()  # each time: an older worker of a mixed fleet may park again what this one knows

    def _hung(self, claim: Claim, stage: str) -> None:
        logger.critical(
            "job %s exceeded its time in stage %s: this process ends, its lease will too",
            claim.job_id,
            stage,
            extra={"action": "stage_hung", "job_id": claim.job_id},
        )
        self._fetch.stop()  # else it claims what goes back
        try:  # a job on the device is marked for this only if it is the device that hangs
            self._hand_back(self._leases.held(outside="device" if stage == "device" else ""))
        finally:
            os._exit(EXIT_BROKEN)  # nothing can interrupt a kernel or a read

    def _thread(self, name: str, body: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                body()
            except BaseException:
                logger.critical("stage %s broke", name, exc_info=True, extra={"action": "stage_broke"})
                self._device_broke |= name == "device"
                self._broken.set()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _wind_down(self, fetch: threading.Thread, device: threading.Thread) -> int:
        logger.info("worker %s is stopping", self._own.name, extra={"action": "worker_stopping"})
        timer = threading.Timer(self._own.grace_s, self._grace_over)
        timer.name, timer.daemon = "grace", True
        timer.start()
        self._fetch.stop()
        self._device.hand_back()
        fetch.join()  # then whatever it claimed is held, and goes back below
        device.join()
        self._finish.close()
        left = self._to_hand_back()
        self._leases.stop()  # first: one more beat would say that we still serve
        try:
            self.store.release(left)
            self.store.serve(self._own.name, self._own.vaes, ttl_s=0, report={})
            with broker_errors(self._connections.url):
                self._presence.leave()
        except LatentqError as error:
            logger.warning("left without a word: %s", error, extra={"action": "leave_failed"})
        timer.cancel()
        return EXIT_BROKEN if self._broken.is_set() else 0

    def _grace_over(self) -> None:
        logger.error("grace period is over; what is left goes back", extra={"action": "grace_over"})
        self._patience.give_up()
        self._hand_back(self._to_hand_back())
        os._exit(EXIT_BROKEN)

    def _to_hand_back(self) -> list[Claim]:
        """What goes back when the process ends. What was on a device that broke is left to its lease, which counts a
        crash: a job that breaks every device must not go from worker to worker for ever."""
        return self._leases.held(outside="device" if self._device_broke else "")

    def _hand_back(self, claims: Sequence[Claim]) -> None:
        try:
            self.store.release(claims)
        except LatentqError as error:
            logger.warning("not handed back: %s", error, extra={"action": "release_failed"})
