"""Decodes clips and pictures of VAEs whose norms are per pixel, row by row through the whole decoder at once.

Nothing needs an activation as a whole but attention, which is at latent resolution. So between two attentions rows go
through all steps as soon as they are known, none is computed twice, and what is held are the last two rows of each
convolution's input, and the picture. Where convolutions look back in time only, the frames of a clip can go through in
groups, each convolution over frames keeping the last two frames of its input: memory then does not grow with the clip.
All frames at once need no such memory, and two rows of all frames are less than two frames of all rows unless a clip
has more frames than rows: arithmetic chooses (`memory`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch

from worker.lowmem_decode.host_memory import Growth, probe, strips_in_heap
from worker.lowmem_decode.pixel_norm.attention import AttentionRun
from worker.lowmem_decode.pixel_norm.kernels import pointwise
from worker.lowmem_decode.pixel_norm.memory import (
    Arrangement,
    arrange,
    frames_of_latent,
    largest_activation,
    result_shape,
)
from worker.lowmem_decode.pixel_norm.steps import Group, Program
from worker.lowmem_decode.pixel_norm.strips import Mapped, Past, Strips, Whole
from worker.lowmem_decode.pixel_norm.structure import read

OnProgress = Callable[[float], None]


def stream(
    module: Any, z: torch.Tensor, *, strip_rows: int | None = None, on_progress: OnProgress | None = None
) -> Generator[torch.Tensor, None, None]:
    """What `module.decode(z)` returns for one clip, in groups of frames: as soon as they are there, or all at the end.

    Args:
        module: a VAE that `supports` knows, without timestep conditioning.
        z: (1, C, f, h, w), denormalised.
        strip_rows: rows of a strip at every resolution; None: by size.
        on_progress: told the part of the work that is done, from 0 to 1, after every strip.

    Yields:
        (1, 3, n, H, W), in order; what each latent frame becomes.
    """
    program = read(module)
    _check(program, z, strip_rows)
    frames = result_shape(program, z.shape[2:])[0]
    for group in _groups(program, z, strip_rows, on_progress):
        yield from _by_latent_frame(program, group, whole=group.shape[2] == frames)


def decode(
    module: Any,
    z: torch.Tensor,
    *,
    strip_rows: int | None = None,
    temb: torch.Tensor | None = None,
    on_progress: OnProgress | None = None,
) -> torch.Tensor:
    """What `module.decode(z).sample` returns untiled: (B, 3, F, H, W).

    Args:
        module: a VAE that `supports` knows.
        z: (B, C, f, h, w), denormalised.
        strip_rows: as for `stream`.
        temb: the timesteps, (B), where the VAE is conditioned on one.
        on_progress: as for `stream`.
    """
    out: torch.Tensor | None = None
    for number, item in enumerate(torch.split(z, 1)):
        program = read(module, None if temb is None else temb[number : number + 1])
        _check(program, item, strip_rows)
        told = None if on_progress is None else _part(on_progress, number, len(z))
        frame = 0
        for group in _groups(program, item, strip_rows, told):
            if len(z) == 1 and group.shape[2] == result_shape(program, z.shape[2:])[0]:
                return group
            if out is None:
                out = group.new_empty(len(z), group.shape[1], *result_shape(program, z.shape[2:]))
            out[number : number + 1, :, frame : frame + group.shape[2]] = group
            frame += group.shape[2]
            del group
    assert out is not None
    return out


def working_bytes(module: Any, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Memory a decode takes above the weights and the latents, the result included, by arithmetic."""
    program = read(module, only_shapes=True)
    found = arrange(program, shape[2:], strip_rows=None)
    result = shape[0] * 3 * math.prod(result_shape(program, shape[2:]))
    held = found.held_bytes + (0 if found.frames_per_group == shape[2] else found.group_bytes)
    return int((held / program.dtype.itemsize + result) * dtype.itemsize)


def largest_bytes(module: Any, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the largest activation of one item, as the VAE's own decode makes it."""
    return largest_activation(read(module, only_shapes=True), shape[2:]) * dtype.itemsize


def _check(program: Program, z: torch.Tensor, strip_rows: int | None) -> None:
    if z.ndim != 5 or z.shape[1] != program.latent_channels or not z.numel():
        raise ValueError(f"latents of shape {tuple(z.shape)} are not (B, {program.latent_channels}, f, h, w)")
    if z.dtype != program.dtype or z.device != program.device:
        raise ValueError(f"latents are {z.dtype} on {z.device}, the VAE is {program.dtype} on {program.device}")
    if program.reflects and min(z.shape[3:]) < 2:
        raise ValueError("a decoder that reflects its edges takes latents of two rows and columns at least")
    if strip_rows is not None and strip_rows < 1:
        raise ValueError(f"strip_rows={strip_rows} is not at least 1")


def _groups(
    program: Program, z: torch.Tensor, strip_rows: int | None, on_progress: OnProgress | None
) -> Generator[torch.Tensor, None, None]:
    """(1, C, f, h, w) to groups (1, 3, n, H, W)."""
    with torch.inference_mode():
        arrangement = arrange(program, z.shape[2:], strip_rows=strip_rows)
        on_host = z.device.type == "cpu"
        if on_host:
            probe(arrangement.held_bytes + arrangement.group_bytes)
    spare = arrangement.spare_bytes
    with strips_in_heap(arrangement.strip_bytes, spare_bytes=spare) if on_host else contextlib.nullcontext():
        with torch.inference_mode():
            groups = _ClipDecode(program, arrangement, frames=z.shape[2], on_progress=on_progress).run(z[0])
        while True:
            with torch.inference_mode():  # not around the yield: the caller's mode is its own
                group = next(groups, None)
            if group is None:
                break
            yield group[None]
            del group


def _by_latent_frame(program: Program, group: torch.Tensor, *, whole: bool) -> Sequence[torch.Tensor]:
    """A group in what each latent frame became: the same pieces, whether the frames went through together or apart."""
    if not whole:
        return [group]
    first, following = frames_of_latent(program)
    rest = group.shape[2] - first
    return torch.split(group, [first, *[following] * (rest // following)], dim=2)


def _part(told: OnProgress, number: int, count: int) -> OnProgress:
    return lambda share: told((number + share) / count)


class _ClipDecode:
    """The decode of one clip."""

    def __init__(
        self, program: Program, arrangement: Arrangement, *, frames: int, on_progress: OnProgress | None
    ) -> None:
        self._program = program
        self._arrangement = arrangement
        self._told = on_progress
        self._pasts: dict[int, Past] = {}
        self._attentions = [
            AttentionRun(block, frames=frames, score_bytes=arrangement.score_bytes) for block in program.attentions
        ]
        on_host = program.device.type == "cpu"
        self._before_conv = Growth().give_back if on_host else lambda: None

    def run(self, latent: torch.Tensor) -> Iterator[torch.Tensor]:
        """(C, f, h, w) to groups (3, n, H, W)."""
        # C, f, h, w → f, h, w, C
        frames = latent.permute(1, 2, 3, 0).contiguous()
        groups = torch.split(frames, self._arrangement.frames_per_group)
        for number, part in enumerate(groups):
            group = Group(
                first=number == 0,
                last=number == len(groups) - 1,
                pasts=self._pasts,
                rows=self._arrangement.rows,
                before_conv=self._before_conv,
            )
            yield self._pixels(self._last_strips(part, group), group, number, len(groups))

    def _last_strips(self, part: torch.Tensor, group: Group) -> Strips:
        """The strips that come out of the last segment, for these latent frames."""
        before = self._program.before
        strips: Strips = Whole(part if before is None else pointwise(before, part))
        for segment, attention in zip(self._program.segments, [*self._attentions, None], strict=True):
            for step in segment:
                strips = step.attach(strips, group)
            if attention is not None:
                stored = self._stored(strips)
                attention(stored)
                strips = Whole(stored)
                del stored
        return strips

    def _stored(self, strips: Strips) -> torch.Tensor:
        stored: torch.Tensor | None = None
        top = 0
        for strip in strips:
            if stored is None:
                stored = strip.new_empty(len(strip), strips.height, *strip.shape[2:])
            stored[:, top : top + strip.shape[1]] = strip
            top += strip.shape[1]
        assert stored is not None
        return stored

    def _pixels(self, strips: Strips, group: Group, number: int, count: int) -> torch.Tensor:
        patches = self._program.patches
        last = Mapped(strips, lambda strip: patches(strip, first=group.first), factor=patches.factor)
        pixels: torch.Tensor | None = None
        top = 0
        for strip in last:
            if pixels is None:
                pixels = strip.new_empty(strip.shape[3], len(strip), last.height, strip.shape[2])
            # f, h, W, 3 → 3, f, h, W
            pixels[:, :, top : top + strip.shape[1]] = strip.permute(3, 0, 1, 2)
            top += strip.shape[1]
            if self._told is not None:
                self._told((number + top / last.height) / count)
        assert pixels is not None
        return pixels.clamp_(-1.0, 1.0) if self._program.clamps else pixels
