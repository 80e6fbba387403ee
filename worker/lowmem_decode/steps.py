"""The steps a decoder is made of, as read off the module that diffusers loaded, and their arithmetic.

A step refers to the modules it runs; it holds no weights of its own. Costs are multiplications of one item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from worker.lowmem_decode.row_conv import Kernel, ShuffledConv3x3, UpsampledConv3x3


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """From latents to the first activation: at latent resolution, so run whole."""

    #: A 1×1 convolution before everything, if there is one.
    before: Any | None
    #: 3×3.
    conv: Any
    #: How often each latent channel is repeated and added to the result; 0: not at all.
    repeats: int = 0

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.conv.out_channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resnet:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x through a 1×1 convolution where the channels change."""

    norm1: Any
    conv1: Any
    norm2: Any
    conv2: Any
    shortcut: Any | None = None
    #: What the sum is divided by.
    scale: float = 1.0

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.conv2.out_channels)

    @property
    def hidden_channels(self) -> int:
        """Channels between the two convolutions."""
        return int(self.conv1.out_channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Self-attention over all pixels, with a GroupNorm before it."""

    norm: Any | None
    #: Products with matrices over the channels: `Linear` layers, or 1×1 convolutions.
    query: Any
    key: Any
    value: Any
    out: Any
    heads: int
    #: Whether the input is added to the result.
    residual: bool
    #: What the sum is divided by.
    scale: float = 1.0

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.out.weight.shape[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Upsample:
    """Twice the rows and columns."""

    #: nearest: repeat pixels, then convolve; shuffle: convolve, then spread channels over pixels.
    kind: Literal["nearest", "shuffle"]
    conv: Any
    #: Of `shuffle`: how often each input channel is repeated for the sum.
    repeats: int = 0

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.conv.out_channels) // (1 if self.kind == "nearest" else 4)

    def kernel(self) -> Kernel:
        """What runs it."""
        if self.kind == "nearest":
            return UpsampledConv3x3(self.conv)
        return ShuffledConv3x3(self.conv, repeats=self.repeats)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The last GroupNorm, SiLU and convolution: to pixels."""

    norm: Any
    conv: Any

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.conv.out_channels)


Step = Resnet | Attention | Upsample


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A decoder, step by step."""

    entry: Entry
    steps: tuple[Step, ...]
    head: Head
    dtype: torch.dtype
    device: torch.device
    latent_channels: int


def groups_of(step: Step | Head) -> int | None:
    """Groups of the GroupNorm a step begins with; None if it begins with none."""
    norm = step.norm1 if isinstance(step, Resnet) else None if isinstance(step, Upsample) else step.norm
    return None if norm is None else int(norm.num_groups)
