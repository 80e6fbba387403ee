"""The decode of one item, a picture or a clip that is decoded at once: step after step, strip after strip."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from worker.lowmem_decode.activation import Activation, Recomputed, Stored, convolved
from worker.lowmem_decode.arrangement import Arrangement
from worker.lowmem_decode.attention import run_attention
from worker.lowmem_decode.conditioned_norm import ConditionedPass
from worker.lowmem_decode.frame_caches import FrameCaches
from worker.lowmem_decode.group_norm import GroupStatistics, normalise
from worker.lowmem_decode.host_memory import give_back
from worker.lowmem_decode.resnet import Norm, ResnetRun
from worker.lowmem_decode.row_conv import Kernel, rows_of
from worker.lowmem_decode.steps import Entry, Head, Program, Resnet, SpatialNorm, Step, Upsampling, norm_of

#: Told that so much of a step is done, on top of what was: (step, share).
Tick = Callable[[int, float], None]


class ItemDecode:
    """One item, or a group of a clip's frames."""

    def __init__(
        self, program: Program, arrangement: Arrangement, tick: Tick, *, caches: FrameCaches | None = None
    ) -> None:
        """Args:
        program: the decoder.
        arrangement: of latents of this size.
        tick: told of progress.
        caches: what convolutions remember of the group before; None: this is all of the clip.
        """
        self._caches = caches
        #: What is entered, (h, t, w, C) of a clip.
        self._latents = torch.empty(0)
        self._program = program
        self._parts = program.parts
        self._arrangement = arrangement
        self._tick = tick

    def run(self, latent: torch.Tensor, picture: torch.Tensor) -> None:
        """Decodes (C, h, w) into (3, H, W), or (C, t, h, w) into (3, T, H, W)."""
        now: Activation = Stored(self._enter(self._parts.entry, latent))
        following = (*self._parts.steps[1:], self._parts.head)
        statistics = self._read_through(now, self._parts.steps[0])
        for number, (step, after) in enumerate(zip(self._parts.steps, following, strict=True)):
            if self._caches is not None:
                self._caches.step()
            if self._program.device.type == "cpu":
                give_back()
            norm = norm_of(after)
            gathered = None if norm is None else self._gather(norm)
            if isinstance(step, Resnet):
                statistics = statistics or self._read_through(now, step)
                assert statistics is not None
                now = self._resnet(number, step, now, statistics, gathered)
            elif isinstance(step, Upsampling):
                assert isinstance(now, Stored)
                now = self._upsample(number, step, now, gathered)
                gathered = gathered if isinstance(now, Stored) else None
            else:
                assert isinstance(now, Stored)
                affine = None if statistics is None else statistics.affine(step.norm)
                score_bytes = self._arrangement.score_bytes
                now = Stored(run_attention(step, now.tensor, affine=affine, score_bytes=score_bytes))
                if gathered is not None:
                    gathered.add(now.tensor)
                self._tick(number, 1.0)
            statistics = gathered
        statistics = statistics or self._read_through(now, self._parts.head)
        self._leave(now, statistics, picture)
        if self._caches is not None:
            self._caches.step()

    def _gather(self, norm: Any) -> GroupStatistics:
        base = norm.norm if isinstance(norm, SpatialNorm) else norm
        return GroupStatistics(
            int(base.num_groups),
            per_frame=self._parts.per_frame,
            piece_elements=self._arrangement.piece_elements,
        )

    def _norm(self, norm: Any, statistics: GroupStatistics, now: Activation) -> Norm:
        """A norm with the statistics of `now`."""
        if isinstance(norm, SpatialNorm):
            conditioned, latents = statistics.affine(norm.norm), self._latents
            return lambda: ConditionedPass(norm, conditioned, latents, height=now.height, inner=now.inner)
        affine = statistics.affine(norm)
        return lambda: lambda strip, room: normalise(strip, affine, out=room)

    def _kernel(self, conv: Any, now: Activation) -> Kernel:
        """What runs a convolution over `now`."""
        past = None if self._caches is None else self._caches.of(conv, height=now.height)
        return self._parts.kernel(conv, past)

    def _rows(self, now: Activation, channels: int) -> int:
        row = math.prod(now.inner)
        itemsize = self._program.dtype.itemsize
        return self._arrangement.rows(row=row, channels=max(now.channels, channels), itemsize=itemsize)

    def _enter(self, entry: Entry, latent: torch.Tensor) -> torch.Tensor:
        """Latents to the first activation: at their resolution, so at once."""
        if self._parts.is_clip:
            # C, t, h, w → h, t, w, C
            rows = latent.permute(2, 1, 3, 0).contiguous()
            if entry.before is not None:
                rows = F.linear(rows, entry.before.weight.flatten(1), entry.before.bias)
            self._latents = rows
            if entry.conv is None:
                return rows
            whole = Stored(rows)
            strips = convolved(
                self._kernel(entry.conv, whole), whole, whole.height, write=lambda strip, room: room.copy_(strip)
            )
            return torch.cat(list(strips)).contiguous()
        assert entry.conv is not None
        image = latent[None]
        if entry.before is not None:
            image = F.conv2d(image, entry.before.weight, entry.before.bias)
        out = rows_of(F.conv2d(image, entry.conv.weight, entry.conv.bias, padding=1))
        if entry.repeats:
            out = out + rows_of(image.repeat_interleave(entry.repeats, dim=1))
        return out.contiguous()

    def _read_through(self, now: Activation, step: Step | Head) -> GroupStatistics | None:
        """Statistics of an activation for the norm a step begins with."""
        norm = norm_of(step)
        if norm is None:
            return None
        statistics = self._gather(norm)
        for strip in now.strips(self._rows(now, now.channels)):
            statistics.add(strip)
        return statistics

    def _resnet(
        self, number: int, block: Resnet, now: Activation, statistics: GroupStatistics, after: GroupStatistics | None
    ) -> Stored:
        height = now.height
        return ResnetRun(
            block=block,
            first=self._norm(block.norm1, statistics, now),
            gather=self._gather,
            norm=self._norm,
            kernel=lambda conv: self._kernel(conv, now),
            rows=self._rows(now, block.hidden_channels),
            keep_hidden=self._arrangement.stores[number],
            tick=lambda rows: self._tick(number, rows / (2 * height)),
        )(now, after=after)

    def _upsample(self, number: int, step: Upsampling, now: Stored, after: GroupStatistics | None) -> Activation:
        result = Recomputed(now, step.kernel(), inner=step.grown(now.inner))
        if not self._arrangement.stores[number]:
            self._tick(number, 1.0)
            return result
        out = now.tensor.new_empty(result.height, *result.inner, result.channels)
        top = 0
        for strip in result.strips(self._rows(result, result.channels)):
            out[top : top + len(strip)] = strip
            if after is not None:
                after.add(strip)
            top += len(strip)
            self._tick(number, len(strip) / result.height)
        return Stored(out)

    def _leave(self, now: Activation, statistics: GroupStatistics | None, picture: torch.Tensor) -> None:
        head = self._parts.head
        write: Callable[[torch.Tensor, torch.Tensor], object]
        write = _silu if statistics is None else self._norm(head.norm, statistics, now)()
        made = convolved(self._kernel(head.conv, now), now, self._rows(now, now.channels), write=write)
        # 3, T, H, W → H, T, W, 3
        rows = picture.permute(2, 1, 3, 0) if self._parts.is_clip else picture.permute(1, 2, 0)
        top = 0
        for strip in made:
            rows[top : top + len(strip)] = strip
            top += len(strip)


def _silu(strip: torch.Tensor, room: torch.Tensor) -> None:
    F.silu(room.copy_(strip), inplace=True)
