"""One way through the device for the jobs of one batch: decode, postprocess, hand the pixels on.

What leaves the device is uint8 pixels (or the VAE's own floats, for `output="tensor"`). On CUDA the copy to the host
runs on a stream of its own into pinned memory, so that the next decode starts meanwhile; whoever takes the chunk waits
for its copy (`HostChunk.get`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from broker_config.errors import NonFiniteOutput, WeightsMismatch
from broker_config.latent_geometry import LatentLayout
from broker_config.messages import DecodeRequest, Kind, Output
from worker.decode import clip_frames, join_chunks, to_pixels
from worker.encode import encode_pixels
from worker.fast_path import FastVae, FastVaes
from worker.latent_io import dtype_name
from worker.latent_layouts import Plan, scaling_of
from worker.lowmem_decode import LowMemoryVae
from worker.memory_ladder import FAST_RUNGS, How, Rung, tiled
from worker.numerical_safety import finite_chunks, is_finite
from worker.stages import ChunkStream, HostChunk, StreamClosed, Timer, Work
from worker.vae_pool import LoadedVae

#: Told of each job before its first chunk.
HandOn = Callable[[Work, ChunkStream], None]


def plan_of(request: DecodeRequest, vae: LoadedVae, *, batch: int) -> Plan:
    """How latents of this request are decoded with this VAE.

    Raises:
        WeightsMismatch: the VAE is not the one the pipeline had.
        InvalidOption: a factor that contradicts the VAE's statistics.
    """
    check_identity(request, vae)
    entry = vae.entry
    return Plan(
        layout=LatentLayout(request.layout),
        scaling=scaling_of(
            vae.module,
            scaling_factor=request.scaling_factor,
            shift_factor=0.0 if request.shift_factor is None and not entry.shifts else request.shift_factor,
            sigma_data=request.sigma_data,
        ),
        batch=batch,
        num_frames=request.num_frames,
        height=request.height,
        width=request.width,
        spatial=entry.spatial,
        is_video=request.is_video,
        state=request.latent_state,
        facts=request.facts,
        patch_size=request.patch_size or entry.patch_size,
        temporal=entry.temporal,
        frames=entry.frames,
        resizes=entry.resizes,
        imagenet=entry.pixels == "imagenet",
        cut=entry.pixels == "cut",
        logc3=entry.is_hdr,
    )


def check_identity(request: DecodeRequest, vae: LoadedVae) -> None:
    """Whether this is the VAE that the pipeline had, as far as the client could tell.

    Raises:
        WeightsMismatch: another class, config or revision.
    """
    for name, wanted, found in (
        ("vae_class", request.vae_class, vae.weights.get("class")),
        ("vae_config", request.vae_config, vae.weights.get("config")),
        ("vae_revision", request.vae_revision, vae.weights.get("revision")),
    ):
        if wanted is not None and wanted != found:
            raise WeightsMismatch(
                f"{name} of the pipeline's VAE is {wanted}, that of VAE {vae.entry.name} here is {found}: name the "
                f"entry with the pipeline's own VAE, or submit without {name}",
                field=name,
            )


def facts_of(vae: LoadedVae, *, mode: str, shared: int, how: How, fast: FastVae | None = None) -> dict[str, object]:
    """What the result records of the decode; `fast`: the VAE's fast ways, if it runs in one."""
    own = {} if fast is None else {"fast_path": fast.facts(compiled=how.rung is Rung.COMPILED)}
    return own | {
        "vae": vae.entry.name,
        "weights": dict(vae.weights),
        "dtype": dtype_name(vae.dtype if fast is None else fast.dtype),
        "device": vae.device.type,
        "mode": mode,
        "batch_jobs": shared,
        "rung": str(how.rung),
        "tiling": how.rung is Rung.TILED or vae.entry.tiled,
    }


def on_rung(module: Any, rung: Rung, *, fast: FastVae | None = None) -> Any:
    """The VAE as it is to be called on a rung; `fast`: its fast ways, if it runs in one."""
    if fast is not None:
        return fast.module(compiled=rung is Rung.COMPILED)
    if rung in (Rung.LOW_MEMORY, Rung.LEAN):
        return LowMemoryVae(module, lean=rung is Rung.LEAN)
    return module


class BatchDecoder:
    """Runs the decodes of one device."""

    def __init__(
        self,
        *,
        hand_on: HandOn,
        on_progress: Callable[[Work, int, int], None],
        default_mode: str,
        fast: FastVaes | None = None,
        on_waiting: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Args:
        hand_on: takes a job over before its first chunk; waits while encoders are behind.
        on_progress: told of (job, frames done, frames in all) after each chunk.
        default_mode: of jobs that name none.
        fast: the fast ways of VAEs, for rungs that are such.
        on_waiting: told how many seconds the device waited for encoders that have not begun with its job.
        """
        self._hand_on = hand_on
        self._on_waiting = on_waiting
        self._on_progress = on_progress
        self.default_mode = default_mode
        self.fast = fast or FastVaes()
        self._copier = HostCopier()
        #: Seconds the device waited in the last `decode` for encoders that were behind.
        self.waited_s = 0.0

    def decode(self, vae: LoadedVae, works: Sequence[Work], how: How) -> None:
        """Decodes these jobs, which share a bucket, and hands on what they become.

        Raises:
            StreamClosed: the encoder of the only job gave up and has said so.
            Exception: whatever the VAE raises; the streams of all jobs are closed then.
        """
        self.waited_s = 0.0
        latents = works[0].latents if len(works) == 1 else torch.cat([work.latents for work in works])
        plan = plan_of(works[0].request, vae, batch=sum(work.request.batch for work in works))
        latents = latents.to(vae.device, non_blocking=True)
        fast = self.fast.of(vae.module, half_suits=vae.half_suits) if how.rung in FAST_RUNGS else None
        for work in works:
            mode = str(work.request.mode or self.default_mode)
            work.decoded_by = facts_of(vae, mode=mode, shared=len(works), how=how, fast=fast)
            if work.preview is not None:
                work.decoded_by["preview"] = work.preview
        run = self._encode if works[0].request.kind is Kind.ENCODE else self._run
        if how.rung is Rung.TILED:
            with tiled(vae.module):
                run(vae, works, latents, plan, how)
        else:
            run(vae, works, latents, plan, how)

    def _encode(self, vae: LoadedVae, works: Sequence[Work], pixels: torch.Tensor, plan: Plan, how: How) -> None:
        """One job, the other way round; encodes are alone in their bucket."""
        (work,) = works
        with Timer() as timer:
            latents = encode_pixels(
                vae.module, pixels, plan, seed=work.request.seed, items_per_call=how.items_per_call
            ).cpu()
        if not is_finite(latents):
            raise NonFiniteOutput(f"the latents have NaN or Inf in {dtype_name(vae.dtype)}: load the VAE in float32")
        work.timings_s["decode"] = timer.s
        self._give(work, [HostChunk(latents)])

    def _run(self, vae: LoadedVae, works: Sequence[Work], latents: torch.Tensor, plan: Plan, how: How) -> None:
        def note(before: int) -> None:
            for work in works:
                work.decoded_by |= {"upcast": "float32", "upcast_from": before}

        by_frames = len(works) == 1 and works[0].request.output is not Output.TENSOR
        fast = self.fast.of(vae.module, half_suits=vae.half_suits) if how.rung in FAST_RUNGS else None
        chunks = finite_chunks(
            on_rung(vae.module, how.rung, fast=fast),
            latents,
            plan,
            items_per_call=how.items_per_call,
            by_frames=by_frames,
            on_upcast=note,
        )
        with contextlib.closing(chunks):  # weights that were widened go back before anybody else decodes
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
            whole = decoded.cpu() if raw else to_pixels(decoded, plan).cpu()
        start = 0
        for work in works:
            work.timings_s["decode"] = timer.s
            with contextlib.suppress(StreamClosed):  # its encoder gave up and has said so; the others go on
                self._give(work, [HostChunk(whole[start : start + work.request.batch])])
            start += work.request.batch

    def _give(self, work: Work, chunks: Sequence[HostChunk]) -> None:
        stream = ChunkStream(on_waiting=self._on_waiting)
        with self._waiting():
            self._hand_on(work, stream)
            for chunk in chunks:
                stream.put(chunk)
            stream.end()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        with Timer() as timer:
            yield
        self.waited_s += timer.s

    def _stream(self, work: Work, chunks: Iterator[torch.Tensor], plan: Plan) -> None:
        """One job; its frames go to the encoder while later ones are still being decoded."""
        stream = ChunkStream(on_waiting=self._on_waiting)
        done, total, spent_s = 0, plan.batch * plan.num_frames, 0.0
        try:
            while True:
                with Timer() as timer:
                    chunk = next(chunks, None)
                    host = None if chunk is None else self._copier.start(to_pixels(clip_frames(chunk, plan), plan))
                if host is None:
                    break
                spent_s += timer.s
                work.timings_s["decode"] = spent_s
                with self._waiting():
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
        if pixels.device not in self._streams:
            self._streams[pixels.device] = torch.cuda.Stream(pixels.device)  # type: ignore[no-untyped-call]
        side = self._streams[pixels.device]
        side.wait_stream(torch.cuda.current_stream(pixels.device))
        with torch.cuda.stream(side):
            host = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
            pixels.record_stream(side)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(side)
        return HostChunk(host, done.synchronize)
