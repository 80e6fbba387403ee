"""Decodes with the memory of about one and a half activations, or of less than one.

What comes back is what the module's own untiled decode would return, up to the order in which floating-point numbers
are added: see docs/decode-speed.md for the differences measured. Items of a batch are decoded one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F

from worker.lowmem_decode.activation import Activation, Recomputed, Stored, convolved
from worker.lowmem_decode.arrangement import Arrangement, arrange, largest_activation
from worker.lowmem_decode.attention import run_attention
from worker.lowmem_decode.group_norm import Affine, GroupStatistics, normalise
from worker.lowmem_decode.host_memory import expect_strips, give_back
from worker.lowmem_decode.resnet import ResnetRun
from worker.lowmem_decode.row_conv import Conv3x3, rows_of
from worker.lowmem_decode.steps import Attention, Entry, Head, Program, Resnet, Upsample, groups_of
from worker.lowmem_decode.structure import UnsupportedStructure, read

#: What a decode takes on a CPU besides its activations: oneDNN's and the BLAS's own buffers, code they generate.
_ASIDE_BYTES: Final = 16 << 20

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
        module: an AutoencoderKL, AutoencoderKLFlux2 or AutoencoderKLHunyuanImage as diffusers loaded it.
        z: (B, C, h, w), denormalised, on the module's device and of its dtype.
        lean: compute the last upsample again each time it is read instead of storing it, and further activations
            where that is needed to hold no more than the largest one.
        strip_rows: rows of a strip at every resolution; None: a 32nd of the largest activation.
        on_progress: told the part of the work that is done, from 0 to 1, after every strip.

    Returns:
        (B, 3, H, W), contiguous, of the module's dtype.

    Raises:
        UnsupportedStructure: the module is not understood; `supports` says so beforehand.
        ValueError: latents of another dtype, device or shape.
        RuntimeError: out of memory; on a CPU with a limit of its address space before anything is run.
    """
    program = read(module)
    if z.ndim != 4 or z.shape[1] != program.latent_channels or not z.numel():
        raise ValueError(f"latents of shape {tuple(z.shape)} are not (B, {program.latent_channels}, h, w)")
    if z.dtype != program.dtype or z.device != program.device:
        raise ValueError(f"latents are {z.dtype} on {z.device}, the VAE is {program.dtype} on {program.device}")
    if strip_rows is not None and strip_rows < 1:
        raise ValueError(f"strip_rows={strip_rows} is not at least 1")
    with torch.inference_mode():
        arrangement = arrange(program, height=z.shape[2], width=z.shape[3], lean=lean, strip_rows=strip_rows)
        scale = 2 ** sum(isinstance(step, Upsample) for step in program.steps)
        _probe(arrangement.peak_bytes, z)
        if z.device.type == "cpu":
            expect_strips(arrangement.strip_bytes)
        picture = z.new_empty(z.shape[0], program.head.channels, z.shape[2] * scale, z.shape[3] * scale)
        progress = _Progress(arrangement, items=len(z), told=on_progress)
        for item, out in zip(z, picture, strict=True):
            _ItemDecode(program, arrangement, progress).run(item, out)
        if z.device.type == "cpu":
            give_back()
        return picture


def working_bytes(module: Any, shape: Sequence[int], dtype: torch.dtype, *, lean: bool = False) -> int:
    """Memory a decode takes above the weights and the latents, by arithmetic: the picture, and the most held for it.

    Args:
        module: as in `decode`.
        shape: (B, C, h, w) of the latents.
        dtype: of latents and weights.
        lean: as in `decode`.
    """
    program = read(module)
    batch, _, height, width = shape
    arrangement = arrange(program, height=height, width=width, lean=lean, strip_rows=None)
    scale = 2 ** sum(isinstance(step, Upsample) for step in program.steps)
    picture = batch * program.head.channels * height * width * scale**2
    return int((arrangement.peak_bytes / program.dtype.itemsize + picture) * dtype.itemsize)


def largest_bytes(module: Any, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the largest activation of one item of these latents."""
    return largest_activation(read(module), height=shape[2], width=shape[3]) * dtype.itemsize


class _Progress:
    """Adds up work done."""

    def __init__(self, arrangement: Arrangement, *, items: int, told: OnProgress | None) -> None:
        self._costs = arrangement.costs
        self._total = sum(arrangement.costs) * items
        self._told = told
        self._done = 0.0

    def tick(self, step: int, share: float) -> None:
        """`share` of a step is done, on top of what was."""
        self._done += self._costs[step] * share
        if self._told is not None:
            self._told(min(1.0, self._done / self._total))


class _ItemDecode:
    """The decode of one item."""

    def __init__(self, program: Program, arrangement: Arrangement, progress: _Progress) -> None:
        self._program = program
        self._arrangement = arrangement
        self._progress = progress

    def run(self, latent: torch.Tensor, picture: torch.Tensor) -> None:
        """Decodes (C, h, w) into (3, H, W)."""
        now: Activation = Stored(_enter(self._program.entry, latent))
        following = (*self._program.steps[1:], self._program.head)
        statistics = self._read_through(now, self._program.steps[0])
        for number, (step, after) in enumerate(zip(self._program.steps, following, strict=True)):
            if self._program.device.type == "cpu":
                give_back()
            groups = groups_of(after)
            gathered = None if groups is None else GroupStatistics(groups)
            if isinstance(step, Resnet):
                statistics = statistics or self._read_through(now, step)
                assert statistics is not None
                now = self._resnet(number, step, now, statistics, gathered)
            elif isinstance(step, Upsample):
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
                self._progress.tick(number, 1.0)
            statistics = gathered
        statistics = statistics or self._read_through(now, self._program.head)
        assert statistics is not None
        self._leave(now, statistics.affine(self._program.head.norm), picture)

    def _rows(self, now: Activation, channels: int) -> int:
        itemsize = self._program.dtype.itemsize
        return self._arrangement.rows(width=now.width, channels=max(now.channels, channels), itemsize=itemsize)

    def _read_through(self, now: Activation, step: Resnet | Attention | Upsample | Head) -> GroupStatistics | None:
        """Statistics of an activation for the norm a step begins with."""
        groups = groups_of(step)
        if groups is None:
            return None
        statistics = GroupStatistics(groups)
        for strip in now.strips(self._rows(now, now.channels)):
            statistics.add(strip)
        return statistics

    def _resnet(
        self, number: int, block: Resnet, now: Activation, statistics: GroupStatistics, after: GroupStatistics | None
    ) -> Stored:
        height = now.height
        return ResnetRun(
            block=block,
            first=statistics.affine(block.norm1),
            rows=self._rows(now, block.hidden_channels),
            keep_hidden=self._arrangement.stores[number],
            tick=lambda rows: self._progress.tick(number, rows / (2 * height)),
        )(now, after=after)

    def _upsample(self, number: int, step: Upsample, now: Stored, after: GroupStatistics | None) -> Activation:
        result = Recomputed(now, step.kernel())
        if not self._arrangement.stores[number]:
            self._progress.tick(number, 1.0)
            return result
        out = now.tensor.new_empty(result.height, result.width, result.channels)
        top = 0
        for strip in result.strips(self._rows(result, result.channels)):
            out[top : top + len(strip)] = strip
            if after is not None:
                after.add(strip)
            top += len(strip)
            self._progress.tick(number, len(strip) / result.height)
        return Stored(out)

    def _leave(self, now: Activation, affine: Affine, picture: torch.Tensor) -> None:
        made = convolved(
            Conv3x3(self._program.head.conv),
            now,
            self._rows(now, now.channels),
            write=lambda strip, room: normalise(strip, affine, out=room),
        )
        top = 0
        for strip in made:
            picture[:, top : top + len(strip)] = strip.permute(2, 0, 1)
            top += len(strip)


def _probe(needed_bytes: int, like: torch.Tensor) -> None:
    """Fails where the address space is too small, while failing is harmless: oneDNN crashes when it gets no memory.

    The memory is not touched, so it is not taken either.
    """
    if like.device.type == "cpu":
        torch.empty(needed_bytes + _ASIDE_BYTES, dtype=torch.uint8)


def _enter(entry: Entry, latent: torch.Tensor) -> torch.Tensor:
    """(C, h, w) to the first activation (h, w, channels)."""
    image = latent[None]
    if entry.before is not None:
        image = F.conv2d(image, entry.before.weight, entry.before.bias)
    out = rows_of(F.conv2d(image, entry.conv.weight, entry.conv.bias, padding=1))
    if entry.repeats:
        out = out + rows_of(image.repeat_interleave(entry.repeats, dim=1))
    return out.contiguous()
