"""In which pieces of time an item is decoded, and how each is arranged.

A picture, and a clip of a VAE that decodes it at once, is one piece. HunyuanVideo's tiles and CogVideoX's groups are as
diffusers makes them. Mochi's norms take each frame by itself and its convolutions see only earlier frames, so a latent
frame at a time gives what the clip at once gives; convolutions then remember two frames each, which is more than a
short clip has, so whichever takes less is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from worker.lowmem_decode.arrangement import (
    Arrangement,
    arrange,
    budget_bytes,
    largest_activation,
    places,
    result_size,
)
from worker.lowmem_decode.steps import Program, Resnet
from worker.memory_ladder import free_bytes
from worker.time_groups import group_spans, tile_spans

Span = tuple[int, int]
#: Free memory of the host, as a multiple of what is to lie there: other threads take some meanwhile.
_HOST_ROOM: Final = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """How each item of some latents is decoded."""

    #: Latent frames of each piece; of a picture one piece, of frames that do not exist.
    spans: tuple[Span, ...]
    #: By a row of a piece's latents, without channels.
    arrangements: dict[tuple[int, ...], Arrangement]
    #: Whether convolutions remember frames from piece to piece.
    cached: bool
    #: Whether those frames lie in host memory.
    caches_on_host: bool
    #: Bytes they take on the device.
    cache_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Most memory held at once, above the weights and without latents and picture."""
        return self.cache_bytes + max(arrangement.peak_bytes for arrangement in self.arrangements.values())

    @property
    def strip_bytes(self) -> int:
        """Bytes of the largest strip."""
        return max(arrangement.strip_bytes for arrangement in self.arrangements.values())

    def cost(self, inners: Sequence[tuple[int, ...]]) -> float:
        """Multiplications of pieces."""
        return sum(sum(self.arrangements[inner].costs) for inner in inners)


def plan_decode(
    module: Any,
    program: Program,
    shape: Sequence[int],
    *,
    lean: bool,
    strip_rows: int | None = None,
    streaming: bool = False,
) -> DecodePlan:
    """Plans the decode of latents.

    Args:
        module: the VAE.
        program: its steps.
        shape: of the latents.
        lean: as for `arrange`.
        strip_rows: likewise.
        streaming: whether frames are to come as early as can be in the memory that the decode takes otherwise.
    """
    budget = budget_bytes(largest_of_plain(module, program, shape) * program.dtype.itemsize, lean=lean)
    plans = []
    for spans in _ways(module, program, shape):
        cached = len(spans) > 1 and program.parts.over_time in ("groups", "causal")
        cache_bytes = _cache_bytes(program, shape) if cached else 0
        on_host = caches_on_host(program, lean=lean, cache_bytes=cache_bytes)
        if on_host:
            cache_bytes = 0
        plans.append(
            DecodePlan(
                spans=spans,
                arrangements={
                    inner: arrange(
                        program,
                        height=shape[-2],
                        inner=inner,
                        # where what is remembered leaves nothing, a piece may still hold as much of its own size
                        budget=max(budget - cache_bytes, budget_bytes(_largest(program, shape, inner), lean=lean)),
                        strip_rows=strip_rows,
                    )
                    for inner in _inners(spans, shape)
                },
                cached=cached,
                caches_on_host=on_host,
                cache_bytes=cache_bytes,
            )
        )
    fitting = [plan for plan in plans if plan.peak_bytes <= budget]
    if fitting:
        chosen = min(fitting, key=lambda plan: plan.cost(_inners(plan.spans, shape)))
    else:
        chosen = min(plans, key=lambda plan: plan.peak_bytes)
    if not streaming:
        return chosen
    return max((plan for plan in plans if plan.peak_bytes <= chosen.peak_bytes), key=lambda plan: len(plan.spans))


def caches_on_host(program: Program, *, lean: bool, cache_bytes: int) -> bool:
    """Whether what convolutions remember lies in host memory: of a lean decode on CUDA, where it is twice as much as
    the largest activation of CogVideoX. Where the host has no room for it either, it stays on the device, which says
    so where a host would end the process.
    """
    return lean and program.device.type == "cuda" and _HOST_ROOM * cache_bytes <= free_bytes(torch.device("cpu"))


def _ways(module: Any, program: Program, shape: Sequence[int]) -> list[tuple[Span, ...]]:
    """The ways to cut a clip in time."""
    over_time = program.parts.over_time
    if over_time == "tiles":
        return [tuple(tile_spans(module, shape[2]))]
    if over_time == "groups":
        return [tuple(group_spans(module, shape[2]))]
    at_once: tuple[Span, ...] = ((0, shape[2]),)
    if over_time == "causal":
        return [at_once, tuple((frame, frame + 1) for frame in range(shape[2]))]
    return [at_once]


def _inners(spans: Sequence[Span], shape: Sequence[int]) -> list[tuple[int, ...]]:
    """A row of each piece's latents, without channels."""
    return [(end - start, shape[4]) if len(shape) == 5 else (shape[3],) for start, end in spans]


def _cache_bytes(program: Program, shape: Sequence[int]) -> int:
    """Bytes of the frames that all convolutions remember; of one also those of the next group."""
    parts, width = program.parts, shape[4]
    frames = [0 if parts.entry.conv is None else shape[3] * width * program.latent_channels]
    inner: tuple[int, ...] = (1, width)
    for place in places(program, height=shape[3], inner=inner):
        if isinstance(place.step, Resnet):
            frame = place.height * place.inner[1]
            frames += [frame * place.channels, frame * place.step.hidden_channels]
    height, inner = result_size(program, height=shape[3], inner=inner)
    if parts.head.norm is not None:
        frames.append(height * inner[1] * parts.steps[-1].channels)
    return (sum(frames) + max(frames)) * 2 * program.dtype.itemsize


def largest_of_plain(module: Any, program: Program, shape: Sequence[int]) -> int:
    """Elements of the largest activation of an item, as the VAE's own decode makes it."""
    spans = _ways(module, program, shape)[0]
    return max(largest_activation(program, height=shape[-2], inner=inner) for inner in _inners(spans, shape))


def _largest(program: Program, shape: Sequence[int], inner: tuple[int, ...]) -> int:
    """Bytes of the largest activation of one piece."""
    return largest_activation(program, height=shape[-2], inner=inner) * program.dtype.itemsize


def frames_made(module: Any, program: Program, shape: Sequence[int]) -> int:
    """Frames a clip becomes."""
    spans = [(0, shape[2])] if program.parts.over_time == "tiles" else _ways(module, program, shape)[0]
    sizes = [result_size(program, height=shape[-2], inner=inner)[1][0] for inner in _inners(spans, shape)]
    return sum(sizes) - frames_dropped(module, sum(sizes))


def frames_dropped(module: Any, frames: int) -> int:
    """Frames at the start that Mochi's latents stand for, but the clip does not have.

    Source: diffusers autoencoder_kl_mochi.py `AutoencoderKLMochi._decode`.
    """
    if not getattr(module, "drop_last_temporal_frames", False):
        return 0
    ratio = int(module.temporal_compression_ratio)
    return ratio - 1 if frames >= ratio else 0


def pixels_made(module: Any, program: Program, shape: Sequence[int]) -> int:
    """Pixels of all frames of an item."""
    if not program.parts.is_clip:
        height, inner = result_size(program, height=shape[-2], inner=(shape[3],))
        return height * math.prod(inner)
    height, inner = result_size(program, height=shape[-2], inner=(1, shape[4]))
    return height * inner[1] * frames_made(module, program, shape)
