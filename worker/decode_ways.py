"""The ways in which a job or a batch is tried, the best first: the planner's choice, and the rungs below it.

Where decodes of a VAE were measured here, the planner chooses by time and memory. Where none were, plain decode (on
CUDA in mode fast: the fast way) begins, with as many items a call as `memory_ladder` estimates to fit. Either way the
rungs of the ladder follow, so that a decode that runs out of memory always finds one that takes less.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import torch

from broker_config.messages import DecodeRequest, Kind, Mode
from worker.decode import FOLDED, folded_at_once
from worker.decode_memory import DecodeMemory, decoded_size
from worker.decode_planner import ONE_BY_ONE, DecodeMode, DecodePlan, plan
from worker.decode_probes import CostModels
from worker.fast_path import FastOptions, FastVae, FastVaes
from worker.frame_stream import frames_at_once
from worker.memory_ladder import (
    How,
    MemoryModel,
    Rung,
    first_guess,
    free_bytes,
    items_that_fit,
    rungs,
)
from worker.settings import WorkerSettings
from worker.stages import Work
from worker.vae_pool import LoadedVae, can_tile

#: How long an answer to what is free is taken for the next decodes as well.
_FREE_IS_NEWS_S: Final = 0.05


def fast_options(own: WorkerSettings) -> FastOptions:
    """What a worker's settings say of the fast way. bfloat16 on a CPU gives way to a dtype that was asked for."""
    return FastOptions(
        use=own.fast_path,
        memory_format=own.memory_format,
        compile=own.compile,
        native_bfloat16=own.dtype is None,
    )


class DecodeWays:
    """Chooses ways on one device."""

    def __init__(self, *, costs: CostModels, fast: FastVaes, memory: MemoryModel, default_mode: str) -> None:
        """Args:
        costs: what decodes took here.
        fast: the fast ways of VAEs.
        memory: working memory of decodes, where no costs were measured.
        default_mode: of jobs that name none.
        """
        self._costs = costs
        self._fast = fast
        self._memory = memory
        self._default_mode = default_mode
        self._sizes = DecodeMemory()
        #: Free memory of devices, and when (`time.monotonic()`) it was asked for.
        self._free: dict[torch.device, tuple[int, float]] = {}

    def of_job(self, vae: LoadedVae, request: DecodeRequest) -> list[How]:
        """Ways to decode one job. A VAE that draws noise for a batch draws other noise for its parts: one way only."""
        if vae.entry.draws_noise:
            return [How(rung=Rung.PLAIN, items_per_call=request.batch)]
        decodes = request.kind is Kind.DECODE
        planned = self._planned(vae, request, items=request.batch) if decodes else None
        if planned is None:
            first, best = self._estimated(vae, request), self._unmeasured(vae, request)
            if first == 0 and decodes:
                best = self._least(vae, request)
        else:
            first, best = planned.items_per_call if planned.fits else 0, Rung(str(planned.mode))
        return list(
            rungs(
                items=request.batch,
                first=first,
                low_memory=decodes and self._sizes.has_low_memory(vae.module),
                tiling_allowed=request.allow_tiling and can_tile(vae.module),
                best=best,
            )
        )

    def of_batch(self, vae: LoadedVae, works: Sequence[Work]) -> How:
        """How a batch of jobs is decoded, in the memory of plain decode; they are tried alone where that fails."""
        items = sum(work.request.batch for work in works)
        request = works[0].request
        planned = self._planned(vae, request, items=items, without=(DecodeMode.LOW_MEMORY, DecodeMode.LEAN))
        if planned is None:
            best, fitting = self._unmeasured(vae, request), self._estimated(vae, request)
        else:
            best, fitting = Rung(str(planned.mode)), planned.items_per_call
        each = 1 if best is Rung.COMPILED else min(items, max(1, fitting))
        return How(rung=Rung.SPLIT if best is Rung.PLAIN and each < items else best, items_per_call=each)

    def _planned(
        self, vae: LoadedVae, request: DecodeRequest, *, items: int, without: Sequence[DecodeMode] = ()
    ) -> DecodePlan | None:
        model = self._costs.known(vae.entry.name, device=vae.device, dtype=vae.dtype)
        if model is None:
            return None
        pixels = request.pixels // request.batch
        if not model.bytes:
            model = model.for_item(self._item_bytes(vae, request), pixels=pixels)
        elif request.layout in FOLDED:
            at_once, one = pixels_at_once(vae, request), pixels // request.num_frames
            kept = _kept_bytes(vae, request)
            each = {
                mode: int(line.at(one if mode in ONE_BY_ONE else at_once)) + kept for mode, line in model.bytes.items()
            }
            model = model.for_item(each, pixels=pixels)
        return plan(
            model,
            items=items,
            pixels_per_item=pixels,
            free_bytes=self._free_bytes(vae.device),
            exact_bits=not self._is_fast(request),
            without=(*without, *self._barred(vae, request)),
        )

    def _barred(self, vae: LoadedVae, request: DecodeRequest) -> list[DecodeMode]:
        """Ways that were measured and cannot be taken: the VAE was loaded anew, or this size was not compiled."""
        fast = self._ways_of(vae)
        barred = [] if fast is not None else [DecodeMode.FAST]
        spatial = vae.entry.spatial
        if fast is None or request.is_video or not fast.compiles(request.height // spatial, request.width // spatial):
            barred.append(DecodeMode.COMPILED)
        if not self._sizes.has_low_memory(vae.module):
            barred += [DecodeMode.LOW_MEMORY, DecodeMode.LEAN]
        return barred

    def _unmeasured(self, vae: LoadedVae, request: DecodeRequest) -> Rung:
        """The rung to begin with where nothing was measured here: what others measured on CUDA."""
        wanted = self._is_fast(request) and request.kind is Kind.DECODE and vae.device.type == "cuda"
        return Rung.FAST if wanted and self._ways_of(vae) is not None else Rung.PLAIN

    def _least(self, vae: LoadedVae, request: DecodeRequest) -> Rung:
        """The rung to begin with where not one item fits in plain decode: the lean one if even the other does not."""
        height, width, frames = decoded_size(vae, request)
        found = self._sizes.in_low_memory(vae, height=height, width=width, num_frames=frames)
        free = self._free_bytes(vae.device)
        too_much = bool(found) and found[DecodeMode.LOW_MEMORY] > free > found[DecodeMode.LEAN]
        return Rung.LEAN if too_much else Rung.PLAIN

    def _item_bytes(self, vae: LoadedVae, request: DecodeRequest) -> dict[DecodeMode, int]:
        height, width, frames = decoded_size(vae, request)
        bytes_per_px = self._bytes_per_px(vae)
        found = self._sizes.of_item(vae, height=height, width=width, num_frames=frames, bytes_per_px=bytes_per_px)
        kept = _kept_bytes(vae, request)
        return {mode: size + kept for mode, size in found.items()}

    def _bytes_per_px(self, vae: LoadedVae) -> float:
        guess = first_guess(vae.module, device=vae.device, dtype=vae.dtype)
        return self._memory.bytes_per_px(vae.entry.name, dtype=vae.dtype, guess=guess)

    def _estimated(self, vae: LoadedVae, request: DecodeRequest) -> int:
        return items_that_fit(
            bytes_per_px=self._bytes_per_px(vae),
            pixels_per_item=pixels_at_once(vae, request),
            free=self._free_bytes(vae.device),
        )

    def _free_bytes(self, device: torch.device) -> int:
        """What a decode may take, by an answer that small decodes share: asking takes as long as one of them."""
        now = time.monotonic()
        if device not in self._free or now - self._free[device][1] > _FREE_IS_NEWS_S:
            self._free[device] = (free_bytes(device), now)
        return self._free[device][0]

    def _ways_of(self, vae: LoadedVae) -> FastVae | None:
        return self._fast.of(vae.module, half_suits=vae.half_suits)

    def _is_fast(self, request: DecodeRequest) -> bool:
        return str(request.mode or self._default_mode) == str(Mode.FAST)


def pixels_at_once(vae: LoadedVae, request: DecodeRequest, *, items: int = 1) -> int:
    """Pixels of so many items of a job that are activations at once: of a clip, those of some of its frames."""
    height, width, frames = decoded_size(vae, request)
    together = items * frames_at_once(vae.module, frames)
    if request.layout in FOLDED:
        asked = request.facts.frames_per_call
        together = min(together, folded_at_once(request.layout, request.num_frames, asked=asked))
    return height * width * together


def _kept_bytes(vae: LoadedVae, request: DecodeRequest) -> int:
    """Of a clip that is decoded in several calls, the frames of all of them but one are kept."""
    height, width, frames = decoded_size(vae, request)
    return 3 * height * width * max(0, request.num_frames - frames) * vae.dtype.itemsize
