"""The second stage: decode a batch and hand its pixels on, chunk by chunk, as they leave the device."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence

import torch

from broker_config.latent_geometry import LatentLayout
from broker_config.messages import DecodeRequest, Output
from worker.attempts import AttemptReporter
from worker.decode import Plan, clip_frames, decode_chunks, join_chunks, to_pixels
from worker.fetch_stage import Batch
from worker.latent_io import dtype_name, to_frames
from worker.latent_layouts import scaling_of
from worker.leases import LeaseKeeper
from worker.settings import WorkerSettings
from worker.stages import (
    Abandoned,
    ChunkStream,
    Failure,
    Stopwatch,
    StreamClosed,
    Timer,
    Work,
    failure_of,
)
from worker.vae_pool import LoadedVae

logger = logging.getLogger(__name__)


def plan_of(request: DecodeRequest, vae: LoadedVae, *, batch: int) -> Plan:
    """How latents of this request are decoded with this VAE."""
    scaling = scaling_of(vae.module.config, scaling_factor=request.scaling_factor, shift_factor=request.shift_factor)
    layout = LatentLayout(request.layout)
    return Plan(
        layout=layout,
        scaling=scaling,
        batch=batch,
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        spatial=vae.entry.spatial,
        is_video=layout in (LatentLayout.VIDEO, LatentLayout.VIDEO_2D),
    )


class DeviceStage:
    """Decodes batches. `run` is the thread's body; nothing in it waits for anything but the device."""

    def __init__(
        self,
        ready: queue.Queue[Batch | None],
        *,
        on_taken: Callable[[], None],
        on_work: Callable[[Work], None],
        reporter: AttemptReporter,
        leases: LeaseKeeper,
        settings: WorkerSettings,
        stopwatch: Stopwatch,
    ) -> None:
        """Args:
        ready: batches from the fetch stage; None ends the thread.
        on_taken: told when a batch is taken, so that the next one is fetched.
        on_work: told of each job before its first chunk, so that its encoder starts; waits while encoders are behind.
        reporter: where failed attempts are told.
        leases: told which jobs are on the device.
        settings: mode and device.
        stopwatch: adds up busy and idle time.
        """
        self._ready = ready
        self._on_taken = on_taken
        self._on_work = on_work
        self._reporter = reporter
        self._leases = leases
        self._settings = settings
        self._stopwatch = stopwatch
        self._released = False

    def run(self) -> None:
        """Decodes until the fetch stage ends."""
        while True:
            with Timer() as waited:
                batch = self._ready.get()
            if batch is None:
                return
            self._on_taken()
            vae, works = batch
            if self._released:
                self._reporter.release([work.claim for work in works])
                continue
            with Timer() as busy:
                self._decode(vae, works)
            self._stopwatch.add(busy_s=busy.s, idle_s=waited.s, jobs=len(works))

    def hand_back(self) -> None:
        """From now on ready batches go back to the queue instead of being decoded."""
        self._released = True

    def _decode(self, vae: LoadedVae, works: list[Work]) -> None:
        try:
            works = [work for work in works if not self._reporter.skip(work.claim)]
            if not works:
                return
            claims = [work.claim for work in works]
            self._leases.enter(claims, "device", limit_s=sum(work.request.timeout_s for work in works))
            self._leases.tell(claims)
            failure = self._attempt(vae, works)
            if failure is None:
                return
            if len(works) == 1:
                self._reporter.fail(works[0].claim, failure, stage="device")
                return
            logger.warning(
                "a batch of %d failed (%s), each job runs alone",
                len(works),
                failure.error.code,
                extra={"action": "batch_split"},
            )
            for work in works:
                alone = self._attempt(vae, [work])
                if alone is not None:
                    self._reporter.fail(work.claim, alone, stage="device")
        except Abandoned:
            logger.warning("gave up on the broker", extra={"action": "abandoned"})

    def _attempt(self, vae: LoadedVae, works: Sequence[Work]) -> Failure | None:
        """Decodes these jobs in one call. What went wrong, as text: the frames of the error are gone by then."""
        try:
            with vae.lock, Timer() as timer:
                self._decode_together(vae, works, timer)
        except StreamClosed:
            return None  # the encoder failed and has said so
        except Exception as error:
            for work in works:
                work.stream.close()
            failure = failure_of(error)
            logger.debug("decode failed", exc_info=error, extra={"action": "decode_failed"})
            del error
            return failure
        return None

    def _decode_together(self, vae: LoadedVae, works: Sequence[Work], timer: Timer) -> None:
        request = works[0].request
        latents = works[0].latents if len(works) == 1 else torch.cat([work.latents for work in works])
        plan = plan_of(request, vae, batch=latents.shape[0])
        if vae.device.type == "cuda":
            latents = latents.to(vae.device, non_blocking=True)
        for work in works:
            work.stream = ChunkStream()  # a batch that is split starts anew
            mode = work.request.mode or self._settings.mode
            work.decoded_by = facts_of(vae, mode=str(mode), shared=len(works))
        if len(works) > 1:
            self._decode_batch(vae, works, latents, plan, timer)
        else:
            self._decode_one(vae, works[0], latents, plan, timer)

    def _decode_batch(
        self, vae: LoadedVae, works: Sequence[Work], latents: torch.Tensor, plan: Plan, timer: Timer
    ) -> None:
        """Several jobs in one call: decoded as a whole first, since one failure must not hit half of them."""
        decoded = join_chunks(list(decode_chunks(vae.module, latents, plan)), plan)
        raw = works[0].request.output is Output.TENSOR
        whole = decoded.cpu() if raw else to_pixels(decoded).cpu()
        timer.stop()
        start = 0
        for work in works:
            mine = whole[start : start + work.request.batch]
            start += work.request.batch
            work.timings_s["decode"] = timer.s
            self._on_work(work)
            work.stream.put(mine if raw else to_frames(mine))
            work.stream.end()

    def _decode_one(self, vae: LoadedVae, work: Work, latents: torch.Tensor, plan: Plan, timer: Timer) -> None:
        """One job; frames go to the encoder while later ones are still being decoded."""
        chunks = decode_chunks(vae.module, latents, plan)
        if work.request.output is Output.TENSOR:
            whole = join_chunks(list(chunks), plan).cpu()
            work.timings_s["decode"] = timer.stop()
            self._on_work(work)
            work.stream.put(whole)
            work.stream.end()
            return
        done, total, started = 0, plan.batch * plan.num_frames, False
        for chunk in chunks:
            pixels = to_frames(to_pixels(clip_frames(chunk, plan)))
            work.timings_s["decode"] = timer.stop()
            if not started:
                self._on_work(work)
                started = True
            work.stream.put(pixels)
            done += len(pixels)
            self._leases.progress(work.claim, done=done, total=total)
        work.stream.end()


def facts_of(vae: LoadedVae, *, mode: str, shared: int) -> dict[str, object]:
    """What the result records of the decode."""
    return {
        "vae": vae.entry.name,
        "weights": dict(vae.weights),
        "dtype": dtype_name(vae.dtype),
        "device": vae.device.type,
        "mode": mode,
        "batch_jobs": shared,
        "tiling": False,
    }
