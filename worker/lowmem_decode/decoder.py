"""Decodes with the memory of about one and a half activations, or of less than one.

What comes back is what the module's own untiled decode would return, up to the order in which floating-point numbers
are added: see docs/decode-speed.md for the differences measured. Items of a batch are decoded one after the other.
Clips are decoded in the pieces of time that `decode_plan` says: the activations are those of one piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from worker.lowmem_decode.arrangement import Arrangement, budget_bytes, result_size
from worker.lowmem_decode.decode_plan import (
    frames_dropped,
    frames_made,
    largest_of_plain,
    pixels_made,
    plan_decode,
)
from worker.lowmem_decode.frame_caches import FrameCaches
from worker.lowmem_decode.host_memory import give_back, probe, strips_in_heap
from worker.lowmem_decode.item_decode import ItemDecode
from worker.lowmem_decode.structure import read
from worker.lowmem_decode.structure_checks import UnsupportedStructure
from worker.time_groups import blended_tiles

OnProgress = Callable[[float], None]


def supports(module: Any) -> str | None:
    """Why `module` cannot be decoded here; None if it can."""
    try:
        read(module)
    except UnsupportedStructure as error:
        return str(error)
    return None


def decode(
    module: Any,
    z: torch.Tensor,
    *,
    lean: bool = False,
    strip_rows: int | None = None,
    on_progress: OnProgress | None = None,
) -> torch.Tensor:
    """What `module.decode(z).sample` returns untiled, in a fraction of the memory.

    Args:
        module: an autoencoder of a class that `structure` knows, as diffusers loaded it.
        z: (B, C, h, w), of clips (B, C, f, h, w), denormalised, on the module's device and of its dtype.
        lean: compute the last upsample again each time it is read instead of storing it, and further activations
            where that is needed to hold no more than the largest one.
        strip_rows: rows of a strip at every resolution; None: a 128th of the largest activation.
        on_progress: told the part of the work that is done, from 0 to 1, after every strip.

    Returns:
        (B, 3, H, W), of clips (B, 3, F, H, W), contiguous, of the module's dtype.

    Raises:
        UnsupportedStructure: the module is not understood; `supports` says so beforehand.
        ValueError: latents of another dtype, device or shape.
        RuntimeError: out of memory; on a CPU with a limit of its address space before anything is run.
    """
    run = _Run(module, z, lean=lean, strip_rows=strip_rows, on_progress=on_progress)
    with run.host_memory(), torch.inference_mode():
        picture = run.picture(z)
        for item, out in zip(torch.split(z, 1), torch.split(picture, 1), strict=True):
            run.into(item, out)
        return picture


def can_stream(module: Any) -> bool:
    """Whether `stream` takes this module: one that decodes clips."""
    return read(module).parts.is_clip


def stream(module: Any, z: torch.Tensor, *, lean: bool = False) -> Generator[torch.Tensor, None, None]:
    """The frames of `decode(module, z)` for one clip, in groups, each as soon as it is there.

    Args:
        module: as for `decode`, of a class that decodes clips.
        z: (1, C, f, h, w).
        lean: as for `decode`.

    Yields:
        (1, 3, n, H, W), in order.

    Raises:
        Exception: as `decode`.
    """
    return _Run(module, z, lean=lean, streaming=True).streamed(z)


def working_bytes(module: Any, shape: Sequence[int], dtype: torch.dtype, *, lean: bool = False) -> int:
    """Memory a decode takes above the weights and the latents, by arithmetic: the picture, and the most held for it.

    Args:
        module: as in `decode`.
        shape: of the latents.
        dtype: of latents and weights.
        lean: as in `decode`.
    """
    program = read(module)
    held = plan_decode(module, program, shape, lean=lean).peak_bytes / program.dtype.itemsize
    picture = shape[0] * program.parts.head.channels * pixels_made(module, program, shape)
    return int((held + picture) * dtype.itemsize)


def largest_bytes(module: Any, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the largest activation of one item of these latents, as the module's own decode makes it."""
    return largest_of_plain(module, read(module), shape) * dtype.itemsize


class _Run:
    """The decodes of one call."""

    def __init__(
        self,
        module: Any,
        z: torch.Tensor,
        *,
        lean: bool,
        strip_rows: int | None = None,
        on_progress: OnProgress | None = None,
        streaming: bool = False,
    ) -> None:
        self._module = module
        self._program = program = read(module)
        self._is_clip = program.parts.is_clip
        if z.ndim != 4 + self._is_clip or z.shape[1] != program.latent_channels or not z.numel():
            wanted = f"(B, {program.latent_channels}, {'f, ' if self._is_clip else ''}h, w)"
            raise ValueError(f"latents of shape {tuple(z.shape)} are not {wanted}")
        if z.dtype != program.dtype or z.device != program.device:
            raise ValueError(f"latents are {z.dtype} on {z.device}, the VAE is {program.dtype} on {program.device}")
        if strip_rows is not None and strip_rows < 1:
            raise ValueError(f"strip_rows={strip_rows} is not at least 1")
        self._plan = plan_decode(module, program, z.shape, lean=lean, strip_rows=strip_rows, streaming=streaming)
        budget = budget_bytes(largest_of_plain(module, program, z.shape) * program.dtype.itemsize, lean=lean)
        self._spare_bytes = max(0, budget - self._plan.peak_bytes) // 2
        inners = [(end - start, z.shape[4]) if self._is_clip else (z.shape[3],) for start, end in self._plan.spans]
        self._progress = _Progress(self._plan.cost(inners) * len(z), on_progress)
        self._on_host = z.device.type == "cpu"
        if self._on_host:
            probe(self._plan.peak_bytes)

    def host_memory(self) -> contextlib.AbstractContextManager[None]:
        """How the host's memory is managed while this runs."""
        return (
            strips_in_heap(self._plan.strip_bytes, spare_bytes=self._spare_bytes)
            if self._on_host
            else contextlib.nullcontext()
        )

    def picture(self, z: torch.Tensor) -> torch.Tensor:
        """Where what these latents become is to lie."""
        out = self._room(z)
        if self._is_clip:
            frames = frames_made(self._module, self._program, z.shape)
            return out if out.shape[2] == frames else z.new_empty(*out.shape[:2], frames, *out.shape[3:])
        return out

    def into(self, item: torch.Tensor, out: torch.Tensor) -> None:
        """Decodes one item (1, …) into `out`."""
        if not self._is_clip:
            self._piece(item, out, None)
            return
        first = 0
        for frames in self.groups(item):
            out[:, :, first : first + frames.shape[2]] = frames
            first += frames.shape[2]

    def streamed(self, item: torch.Tensor) -> Generator[torch.Tensor, None, None]:
        """The same groups whether the frames go through together or apart: what each latent frame, or tile, becomes."""
        with self.host_memory():
            for group in self.groups(item):
                if self._program.parts.over_time != "causal" or len(self._plan.spans) > 1:
                    yield group
                    continue
                _, (each, _) = result_size(self._program, height=1, inner=(1, 1))
                first = each - frames_dropped(self._module, each)
                yield from torch.split(group, [first, *[each] * ((group.shape[2] - first) // each)], dim=2)

    def groups(self, item: torch.Tensor) -> Generator[torch.Tensor, None, None]:
        """The frames of one clip (1, C, f, h, w), in groups."""
        if self._program.parts.over_time == "tiles":
            yield from blended_tiles(self._module, item, lambda tile: self._decoded(tile, None))
            return
        caches = FrameCaches(on_host=self._plan.caches_on_host) if self._plan.cached else None
        for start, end in self._plan.spans:
            if caches is not None:
                caches.keeps = end < item.shape[2]
            made = self._decoded(item[:, :, start:end], caches)
            if start == 0:
                made = made[:, :, frames_dropped(self._module, made.shape[2]) :]
            yield made
            del made

    def _room(self, part: torch.Tensor) -> torch.Tensor:
        height, inner = result_size(self._program, height=part.shape[-2], inner=(*part.shape[2:-2], part.shape[-1]))
        return part.new_empty(len(part), self._program.parts.head.channels, *inner[:-1], height, inner[-1])

    def _decoded(self, part: torch.Tensor, caches: FrameCaches | None) -> torch.Tensor:
        with torch.inference_mode():
            out = self._room(part)
            self._piece(part, out, caches)
            return out

    def _piece(self, part: torch.Tensor, out: torch.Tensor, caches: FrameCaches | None) -> None:
        arrangement = self._plan.arrangements[(*part.shape[2:-2], part.shape[-1])]
        tick = self._progress.of(arrangement)
        ItemDecode(self._program, arrangement, tick, caches=caches).run(part[0], out[0])
        if self._on_host:
            give_back()


class _Progress:
    """Adds up work done."""

    def __init__(self, total: float, told: OnProgress | None) -> None:
        self._total = total
        self._told = told
        self._done = 0.0

    def of(self, arrangement: Arrangement) -> Callable[[int, float], None]:
        """What is told of the steps of one decode."""

        def tick(step: int, share: float) -> None:
            self._done += arrangement.costs[step] * share
            if self._told is not None:
                self._told(min(1.0, self._done / self._total))

        return tick
