"""The steps of a decoder whose norms are per pixel, and how strips go through them.

A step refers to the modules it runs; it holds no weights of its own. `attach` puts it behind strips: nothing is
computed before the result is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from worker.lowmem_decode.pixel_norm.kernels import Kernel, frames_conv, pointwise
from worker.lowmem_decode.pixel_norm.norms import Norm
from worker.lowmem_decode.pixel_norm.spreads import Spread
from worker.lowmem_decode.pixel_norm.strips import Beside, Cut, Edge, Mapped, Past, RowQueue, Strips, Windows


@dataclass(kw_only=True, slots=True)
class Group:
    """The frames of a clip that go through a decoder together."""

    #: Whether they are the first.
    first: bool
    #: Whether they are the last.
    last: bool
    #: Of each convolution over frames, by its identity: what the group before left, and the next one needs.
    pasts: dict[int, Past]
    #: Rows of a strip of so many bytes a row.
    rows: Callable[[int], int]
    #: Called before each run of a convolution.
    before_conv: Callable[[], None]

    def past(self, step: object) -> Past | None:
        """What a step keeps for the next group; None if there is no other group."""
        return None if self.first and self.last else self.pasts.setdefault(id(step), Past())


class Step(Protocol):
    """One step of a decoder."""

    def attach(self, source: Strips, group: Group) -> Strips:
        """The strips of the step's result."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Conv:
    """A convolution, with a norm and SiLU before it, and channels spread over pixels after it."""

    kernel: Kernel
    norm: Norm | None = None
    spread: Spread | None = None
    #: What stands beside the first row and column.
    edge: Edge = "zeros"
    #: What stands before the first frame.
    frames_edge: Edge = "zeros"
    causal: bool = True

    def attach(self, source: Strips, group: Group) -> Strips:
        kernel = self.kernel
        widest = max(kernel.in_channels, kernel.out_channels * kernel.factor**2)
        cut = Cut(source, lambda strip: group.rows(len(strip) * strip.shape[2] * widest * strip.element_size()))
        strips: Strips = cut if self.norm is None else Mapped(cut, self._normed)
        if kernel.frames_beside:
            past = group.past(self)
            beside = Beside(edge=self.frames_edge, causal=self.causal, past=past, first=group.first)
            strips = Mapped(strips, lambda strip: beside.around(strip, height=source.height))
        padded = self.edge != "zeros"
        windows = Windows(strips, edge=self.edge)

        def convolved(window: torch.Tensor) -> torch.Tensor:
            group.before_conv()
            return kernel(window, columns_padded=padded)

        out = Mapped(windows, convolved, factor=kernel.factor)
        spread = self.spread
        if spread is None:
            return out
        return Mapped(out, lambda strip: spread(strip, first=group.first), factor=spread.factor)

    def _normed(self, strip: torch.Tensor) -> torch.Tensor:
        assert self.norm is not None
        return F.silu(self.norm(strip), inplace=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class FramesUpsample:
    """Twice the frames by a convolution over three frames; the first frame of a clip passes, and is not remembered.

    Source: diffusers autoencoder_kl_wan.py `WanResample.forward` (upsample3d, "Rep").
    """

    conv: Any

    def attach(self, source: Strips, group: Group) -> Strips:
        past = group.past(self)
        # no frame that this convolution sees was in the first group, if that was one frame
        begun = past is not None and past.frames is not None
        beside = Beside(past=past, first=not begun)
        widest = int(self.conv.out_channels)
        cut = Cut(source, lambda strip: group.rows(len(strip) * strip.shape[2] * widest * strip.element_size()))

        def doubled(strip: torch.Tensor) -> torch.Tensor:
            alone, strip = (strip[:1], strip[1:]) if group.first else (strip[:0], strip)
            if not len(strip):
                return alone
            window = beside.around(strip, height=source.height)
            if len(window) == 1:
                window = torch.cat([window.new_zeros(2, *window.shape[1:]), window])
            frames, rows, width, channels = strip.shape
            # f, h, W, 2·C → f, 2, h, W, C
            out = frames_conv(self.conv, window).view(frames, rows, width, 2, channels).movedim(3, 1)
            return torch.cat([alone, out.reshape(2 * frames, rows, width, channels)])

        return Mapped(cut, doubled)


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """What some steps make, and what went into them."""

    steps: tuple[Step, ...]
    #: Of what went in: a norm, a convolution of one pixel, channels spread.
    norm: Any | None = None
    conv: Any | None = None
    spread: Spread | None = None

    def attach(self, source: Strips, group: Group) -> Strips:
        waiting = RowQueue()

        def seen(strip: torch.Tensor) -> torch.Tensor:
            waiting.put(strip)
            return strip

        strips: Strips = Mapped(source, seen)
        for step in self.steps:
            strips = step.attach(strips, group)
        factor = 1 if self.spread is None else self.spread.factor

        def added(strip: torch.Tensor) -> torch.Tensor:
            return strip.add_(self._beside(waiting.take(strip.shape[1] // factor), group))

        return Mapped(strips, added)

    def _beside(self, strip: torch.Tensor, group: Group) -> torch.Tensor:
        if self.norm is not None:
            strip = F.layer_norm(strip, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        if self.conv is not None:
            strip = pointwise(self.conv, strip)
        return strip if self.spread is None else self.spread(strip, first=group.first)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Self-attention over a frame, or over a frame and those before it; a norm before it, its input added."""

    norm: Norm
    #: Products with matrices over the channels: to queries, keys and values, in one or in three.
    projections: tuple[Any, ...]
    out: Any
    #: Whether frames see those before them.
    over_frames: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A decoder, step by step."""

    #: A convolution of one pixel before everything.
    before: Any | None
    #: Steps through which rows stream; between two of these, an attention that needs all rows.
    segments: tuple[tuple[Step, ...], ...]
    attentions: tuple[Attention, ...]
    #: From the last strips to pixels.
    patches: Spread
    #: Whether pixels are cut off at -1 and 1.
    clamps: bool
    #: Whether a frame depends on none behind it: frames can be decoded group by group.
    causal: bool
    #: Latent frames the VAE's own decode takes together; None: all.
    frames_per_call: int | None
    dtype: torch.dtype
    device: torch.device
    latent_channels: int
    #: Modules that were run while the decoder was read, and are not run again.
    read: tuple[Any, ...] = ()

    @property
    def reflects(self) -> bool:
        """Whether rows and columns beyond the edge are those inside it."""
        return any(isinstance(step, Conv) and step.edge == "reflect" for step in self.segments[0])
