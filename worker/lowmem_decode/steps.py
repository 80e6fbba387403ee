"""The steps a decoder is made of, as read off the module that diffusers loaded, and their arithmetic.

A step refers to the modules it runs; it holds no weights of its own. Costs are multiplications of one item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from worker.lowmem_decode.clip_conv import FramewiseUpsampledConv, Unfolded, UpsampledClipConv
from worker.lowmem_decode.frame_caches import Past
from worker.lowmem_decode.row_conv import Conv3x3, Kernel, ShuffledConv3x3, UpsampledConv3x3


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """From latents to the first activation: at latent resolution, so run whole."""

    #: A 1×1 convolution before everything, if there is one.
    before: Any | None
    #: 3×3; None: `before` is all there is.
    conv: Any | None
    #: How often each latent channel is repeated and added to the result; 0: not at all.
    repeats: int = 0

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int((self.before if self.conv is None else self.conv).out_channels)  # type: ignore[union-attr]

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int((self.conv if self.before is None else self.before).in_channels)  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpatialNorm:
    """A GroupNorm whose result is multiplied by one product of the latents, and another added."""

    norm: Any
    #: 1×1×1.
    scale: Any
    shift: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Resnet:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x through a 1×1 convolution where the channels change.

    Norms are GroupNorms, or each a `SpatialNorm`.
    """

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
    """Self-attention over all pixels, of a clip those of its own and of earlier frames; with a GroupNorm before it."""

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

    @property
    def repeats_pixels(self) -> bool:
        """Whether the plain decode has the repeated pixels as an activation."""
        return self.kind == "nearest"

    @property
    def taps(self) -> int:
        """Multiplications for each pixel and channel of the input."""
        return (4 if self.kind == "nearest" else 9) * 4 * self.channels

    def grown(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        """A row of the result, without channels, for one of the input."""
        return (inner[0] * 2,)

    def kernel(self) -> Kernel:
        """What runs it."""
        if self.kind == "nearest":
            return UpsampledConv3x3(self.conv)
        return ShuffledConv3x3(self.conv, repeats=self.repeats)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipUpsample:
    """Twice the rows and columns of a clip, and of all its frames but the first if `twice_the_frames`; convolved."""

    conv: Any
    twice_the_frames: bool
    repeats_pixels = True

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.conv.out_channels)

    @property
    def taps(self) -> int:
        """Multiplications for each pixel and channel of the input."""
        return (64 if self.twice_the_frames else 48) * self.channels

    def grown(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        """A row of the result, without channels, for one of the input."""
        frames, width = inner
        return (2 * frames - 1 if self.twice_the_frames else frames), 2 * width

    def kernel(self) -> Kernel:
        """What runs it."""
        return UpsampledClipConv(self.conv, twice_the_frames=self.twice_the_frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class FramewiseUpsample:
    """Twice the rows and columns of a clip's frames, each convolved by itself; the frames twice if `compress_time`."""

    conv: Any
    compress_time: bool
    repeats_pixels = True

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.conv.out_channels)

    @property
    def taps(self) -> int:
        """Multiplications for each pixel and channel of the input."""
        return 16 * self.channels

    def grown(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        """A row of the result, without channels, for one of the input."""
        frames, width = inner
        return (2 * frames - frames % 2 if self.compress_time and frames > 1 else frames), 2 * width

    def kernel(self) -> Kernel:
        """What runs it."""
        return FramewiseUpsampledConv(self.conv, compress_time=self.compress_time)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unfold:
    """Channels become frames, twice the rows and twice the columns, after a product with a matrix."""

    linear: Any
    frames: int
    repeats_pixels = False

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.linear.out_features) // (self.frames * 4)

    @property
    def taps(self) -> int:
        """Multiplications for each pixel and channel of the input."""
        return int(self.linear.out_features)

    def grown(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        """A row of the result, without channels, for one of the input."""
        frames, width = inner
        return frames * self.frames, 2 * width

    def kernel(self) -> Kernel:
        """What runs it."""
        return Unfolded(self.linear, frames=self.frames, rows=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The last norm, if there is one, SiLU and convolution or product with a matrix: to pixels."""

    norm: Any | None
    conv: Any

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return int(self.conv.weight.shape[0])


Upsampling = Upsample | ClipUpsample | FramewiseUpsample | Unfold
Step = Resnet | Attention | Upsampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A decoder, step by step."""

    entry: Entry
    steps: tuple[Step, ...]
    head: Head
    #: What runs a convolution of it, which may remember frames of the group before.
    kernel: Callable[[Any, Past | None], Kernel]
    #: Whether it decodes clips: activations are (H, T, W, C).
    is_clip: bool = False
    #: Whether norms take each frame by itself.
    per_frame: bool = False
    #: How a clip is decoded: in blended tiles of time; in groups of frames that remember those before; at once, though
    #: groups would give the same.
    over_time: Literal["tiles", "groups", "causal"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A decoder and its weights."""

    parts: Parts
    dtype: torch.dtype
    device: torch.device
    latent_channels: int


def picture_kernel(conv: Any, past: Past | None) -> Kernel:
    """What runs a convolution of a picture's decoder."""
    assert past is None
    return Conv3x3(conv)


def norm_of(step: Step | Head) -> Any | None:
    """The norm a step begins with; None if it begins with none."""
    return step.norm1 if isinstance(step, Resnet) else None if isinstance(step, Upsampling) else step.norm
