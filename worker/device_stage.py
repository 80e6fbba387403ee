"""The second stage: takes ready batches and brings each through the device, whatever it takes.

A batch that fails is split and its jobs run alone, so that the right one is blamed. A decode that runs out of memory
climbs the rungs of `memory_ladder`. Only what fails alone and on every rung is told as a failed attempt.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence

from broker_config.errors import OutOfMemory
from broker_config.messages import Kind
from worker.attempts import AttemptReporter
from worker.batch_decode import BatchDecoder
from worker.decode_pace import DecodePace
from worker.decode_probes import CostModels
from worker.decode_ways import DecodeWays, pixels_at_once
from worker.fetch_stage import Batch
from worker.leases import LeaseKeeper
from worker.memory_ladder import How, MemoryModel, Meter, Rung, make_room, synchronize
from worker.next_claim import NextClaim
from worker.preview import Previewer
from worker.stages import Abandoned, Failure, Stopwatch, StreamClosed, Timer, Work, failure_of
from worker.vae_pool import LoadedVae

logger = logging.getLogger(__name__)


class DeviceStage:
    """Decodes batches. `run` is the thread's body; it waits for nothing but the device and full encoders."""

    def __init__(
        self,
        ready: queue.Queue[Batch | None],
        *,
        next_claim: NextClaim,
        decoder: BatchDecoder,
        reporter: AttemptReporter,
        leases: LeaseKeeper,
        previewer: Previewer,
        evict_others: Callable[[str], int],
        stopwatch: Stopwatch,
        costs: CostModels | None = None,
    ) -> None:
        """Args:
        ready: batches from the fetch stage; None ends the thread.
        next_claim: told when a batch is taken and when the device is free, so that the next one is fetched in time.
        decoder: runs one decode.
        reporter: where failed attempts are told.
        leases: told which jobs are on the device.
        previewer: shows previews of jobs that ask for them.
        evict_others: drops every loaded VAE but the named one.
        stopwatch: adds up busy and idle time.
        costs: what decodes took here, for the planner; None: nothing is known.
        """
        self._ready = ready
        self._next_claim = next_claim
        self._decoder = decoder
        self._reporter = reporter
        self._leases = leases
        self._previewer = previewer
        self._evict_others = evict_others
        self._stopwatch = stopwatch
        self._released = False
        #: Seconds the device waited for the batch it has: for latents, for the broker, for encoders.
        self._waited_s = 0.0
        self.memory = MemoryModel()
        self._ways = DecodeWays(
            costs=costs or CostModels(), fast=decoder.fast, memory=self.memory, default_mode=decoder.default_mode
        )
        self._pace = DecodePace()

    def run(self) -> None:
        """Decodes until the fetch stage ends."""
        while True:
            self._next_claim.device_is_free()
            with Timer() as waited:
                batch = self._ready.get()
            if batch is None:
                return
            vae, works = batch
            self._next_claim.taken(expected_s=self._expected_s(vae, works))
            if self._released:
                self._reporter.release([work.claim for work in works])
                continue
            self._waited_s = waited.s
            with Timer() as taken:
                self._bring_through(vae, works)
            inside_s = self._waited_s - waited.s
            self._stopwatch.add(busy_s=taken.s - inside_s, idle_s=self._waited_s, jobs=len(works))

    def _expected_s(self, vae: LoadedVae, works: Sequence[Work]) -> float:
        """How long the device will need for a batch; 0 where that cannot be foreseen."""
        if self._released:
            return 0.0
        pixels = sum(work.request.pixels for work in works)
        return self._pace.expected_s(vae.entry.name, works[0].request.kind, pixels=pixels)

    def hand_back(self) -> None:
        """From now on ready batches go back to the queue instead of being decoded."""
        self._released = True

    def _bring_through(self, vae: LoadedVae, works: list[Work]) -> None:
        try:
            works = [work for work in works if not self._reporter.skip(work.claim)]
            if not works:
                return
            claims = [work.claim for work in works]
            self._leases.enter(claims, "device", limit_s=sum(work.request.timeout_s for work in works))
            with Timer() as told:
                self._leases.tell(claims)
                works = [work for work in works if not self._reporter.skip(work.claim)]  # the answer may say so
            self._waited_s += told.s
            if not works:
                return
            for work in works:
                if work.preview is None:  # halves of a batch come by again
                    self._previewer.show(work)
            if len(works) > 1 and self._together(vae, works):
                return
            for work in works:
                failure = self._alone(vae, work)
                if failure is not None:
                    self._reporter.fail(work.claim, failure, stage="device")
        except Abandoned:
            logger.warning("gave up on the broker", extra={"action": "abandoned"})

    def _together(self, vae: LoadedVae, works: list[Work]) -> bool:
        """Decodes a batch in one call. Returns whether its jobs are done with."""
        failure = self._try(vae, works, self._ways.of_batch(vae, works))
        if failure is None:
            return True
        logger.warning("a batch of %d failed (%s)", len(works), failure.error.code, extra={"action": "batch_split"})
        if isinstance(failure.error, OutOfMemory):
            make_room(vae.device, evict=lambda: self._evict_others(vae.entry.name))
            if len(works) > 2:  # halves, since half of it may well fit
                middle = len(works) // 2
                self._bring_through(vae, works[:middle])
                self._bring_through(vae, works[middle:])
                return True
        return False

    def _alone(self, vae: LoadedVae, work: Work) -> Failure | None:
        """Decodes one job, on the first rung that has the memory. Returns what went wrong on the last."""
        ways = self._ways.of_job(vae, work.request)
        ways.insert(0, ways[0])  # the first way once more, after room was made
        failure: Failure | None = None
        for number, how in enumerate(ways):
            if number > 0:
                logger.warning(
                    "job %s: out of memory, trying %s with %d a call",
                    work.claim.job_id,
                    how.rung,
                    how.items_per_call,
                    extra={"action": "memory_rung", "job_id": work.claim.job_id, "rung": str(how.rung)},
                )
            failure = self._try(vae, [work], how)
            if failure is None or not isinstance(failure.error, OutOfMemory):
                return failure
            make_room(vae.device, evict=lambda: self._evict_others(vae.entry.name))
        return failure

    def _try(self, vae: LoadedVae, works: Sequence[Work], how: How) -> Failure | None:
        """One decode. What went wrong, as text: the frames of the error, and their tensors, are gone by then."""
        name, kind, pixels = vae.entry.name, works[0].request.kind, sum(work.request.pixels for work in works)
        # One that was held for hung before, or killed its process, has all of its timeout.
        if not any(work.claim.crashes for work in works):
            self._leases.expect(
                [work.claim for work in works], within_s=self._pace.silence_s(name, kind, pixels=pixels)
            )
        try:
            with vae.lock, Meter(vae.device) as meter, Timer() as timer:
                self._decoder.decode(vae, works, how)
            self._waited_s += self._decoder.waited_s
            self._pace.learn(name, kind, pixels=pixels, seconds=timer.s - self._decoder.waited_s)
            failure = None
        except Abandoned:
            raise
        except StreamClosed:
            return None  # the encoder failed and has said so
        except Exception as error:
            logger.debug("decode failed", exc_info=error, extra={"action": "decode_failed"})
            failure = failure_of(error)
        if failure is not None:
            # After some faults every call on a device raises. Then this raises as well, and the process ends: the next
            # one has a sound device, and here every job that is claimed would fail.
            synchronize(vae.device)
            return failure
        self._leases.enter(
            [work.claim for work in works], "encode", limit_s=sum(work.request.timeout_s for work in works)
        )
        if how.rung not in (Rung.PLAIN, Rung.SPLIT) or works[0].request.kind is Kind.ENCODE:
            return None  # the other rungs take less, and would make the plain one look small; an encode is no decode
        if "upcast" in works[0].decoded_by:
            return None  # took what float32 takes
        pixels = pixels_at_once(vae, works[0].request, items=how.items_per_call)
        self.memory.learn(name, dtype=vae.dtype, pixels=pixels, used_bytes=meter.used_bytes)
        return None
