"""One way through the device for the jobs of one batch: decode, postprocess, hand the pixels on.

What leaves the device is uint8 pixels (or the VAE's own floats, for `output="tensor"`). On CUDA the copy to the host
runs on a stream of its own into pinned memory, so that the next decode starts meanwhile; whoever takes the chunk waits
for its copy (`HostChunk.get`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from broker_config.latent_geometry import LatentLayout
from broker_config.messages import DecodeRequest, Output
from worker import lowmem_decode
from worker.decode import Plan, clip_frames, decode_chunks, join_chunks, to_pixels
from worker.latent_io import dtype_name
from worker.latent_layouts import scaling_of
from worker.memory_ladder import How, Rung, tiled
from worker.stages import ChunkStream, HostChunk, Timer, Work
from worker.vae_pool import LoadedVae

#: Told of each job before its first chunk.
HandOn = Callable[[Work, ChunkStream], None]


def plan_of(request: DecodeRequest, vae: LoadedVae, *, batch: int) -> Plan:
    """How latents of this request are decoded with this VAE."""
    layout = LatentLayout(request.layout)
    return Plan(
        layout=layout,
        scaling=scaling_of(vae.module.config, scaling_factor=request.scaling_factor, shift_factor=request.shift_factor),
        batch=batch,
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        spatial=vae.entry.spatial,
        is_video=layout in (LatentLayout.VIDEO, LatentLayout.VIDEO_2D),
    )


def facts_of(vae: LoadedVae, *, mode: str, shared: int, how: How) -> dict[str, object]:
    """What the result records of the decode."""
    return {
        "vae": vae.entry.name,
        "weights": dict(vae.weights),
        "dtype": dtype_name(vae.dtype),
        "device": vae.device.type,
        "mode": mode,
        "batch_jobs": shared,
        "rung": str(how.rung),
        "tiling": how.rung is Rung.TILED,
    }


def sample_decoder(module: Any, rung: Rung) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What decodes on a rung, if it is not the module's own `decode`."""
    if rung is Rung.LOW_MEMORY:
        return partial(lowmem_decode.decode, module)
    if rung is Rung.LEAN:
        return partial(lowmem_decode.decode, module, lean=True)
    return None


class BatchDecoder:
    """Runs the decodes of one device."""

    def __init__(self, *, hand_on: HandOn, on_progress: Callable[[Work, int, int], None], default_mode: str) -> None:
        """Args:
        hand_on: takes a job over before its first chunk; waits while encoders are behind.
        on_progress: told of (job, frames done, frames in all) after each chunk.
        default_mode: recorded for jobs that name none.
        """
        self._hand_on = hand_on
        self._on_progress = on_progress
        self._default_mode = default_mode
        self._copier = HostCopier()

    def decode(self, vae: LoadedVae, works: Sequence[Work], how: How) -> None:
        """Decodes these jobs, which share a bucket, and hands on what they become.

        Raises:
            StreamClosed: the encoder of a job gave up and has said so.
            Exception: whatever the VAE raises; the streams of all jobs are closed then.
        """
        latents = works[0].latents if len(works) == 1 else torch.cat([work.latents for work in works])
        plan = plan_of(works[0].request, vae, batch=latents.shape[0])
        latents = latents.to(vae.device, non_blocking=True)
        for work in works:
            mode = str(work.request.mode or self._default_mode)
            work.decoded_by = facts_of(vae, mode=mode, shared=len(works), how=how)
        if how.rung is Rung.TILED:
            with tiled(vae.module):
                self._run(vae, works, latents, plan, how)
        else:
            self._run(vae, works, latents, plan, how)

    def _run(self, vae: LoadedVae, works: Sequence[Work], latents: torch.Tensor, plan: Plan, how: How) -> None:
        chunks = decode_chunks(
            vae.module, latents, plan, items_per_call=how.items_per_call, decode=sample_decoder(vae.module, how.rung)
        )
        if len(works) > 1:
            self._hand_out(works, chunks, plan)
        elif works[0].request.output is Output.TENSOR:
            with Timer() as timer:
                whole = join_chunks(list(chunks), plan).cpu()
            works[0].timings_s["decode"] = timer.s
            self._give(works[0], [HostChunk(whole)])
        else:
            self._stream(works[0], chunks, plan)

    def _hand_out(self, works: Sequence[Work], chunks: Iterator[torch.Tensor], plan: Plan) -> None:
        """Several jobs in one call: decoded as a whole first, since one failure must not hit half of them."""
        raw = works[0].request.output is Output.TENSOR
        with Timer() as timer:
            decoded = join_chunks(list(chunks), plan)
            whole = decoded.cpu() if raw else to_pixels(decoded).cpu()
        start = 0
        for work in works:
            work.timings_s["decode"] = timer.s
            self._give(work, [HostChunk(whole[start : start + work.request.batch])])
            start += work.request.batch

    def _give(self, work: Work, chunks: Sequence[HostChunk]) -> None:
        stream = ChunkStream()
        self._hand_on(work, stream)
        for chunk in chunks:
            stream.put(chunk)
        stream.end()

    def _stream(self, work: Work, chunks: Iterator[torch.Tensor], plan: Plan) -> None:
        """One job; its frames go to the encoder while later ones are still being decoded."""
        stream = ChunkStream()
        done, total, spent_s = 0, plan.batch * plan.num_frames, 0.0
        try:
            while True:
                with Timer() as timer:
                    chunk = next(chunks, None)
                    host = None if chunk is None else self._copier.start(to_pixels(clip_frames(chunk, plan)))
                if host is None:
                    break
                spent_s += timer.s
                work.timings_s["decode"] = spent_s
                if done == 0:
                    self._hand_on(work, stream)
                stream.put(host)
                done += host.items
                self._on_progress(work, done, total)
            stream.end()
        except BaseException:
            stream.close()
            raise


class HostCopier:
    """Copies pixels to the host without making the device wait."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def start(self, pixels: torch.Tensor) -> HostChunk:
        """Starts the copy of `pixels`; on a CPU there is nothing to copy."""
        if pixels.device.type != "cuda":
            return HostChunk(pixels)
        side = self._streams.setdefault(pixels.device, torch.cuda.Stream(pixels.device))  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(pixels.device))
        with torch.cuda.stream(side):
            host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
            pixels.record_stream(side)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(side)
        return HostChunk(host, done.synchronize)
