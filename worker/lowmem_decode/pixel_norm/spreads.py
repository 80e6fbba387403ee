"""Channels of a pixel that become pixels and frames beside each other.

All take and give strips (frames, rows, W, C). Where frames grow, the first frame of a clip grows to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch


class Spread(Protocol):
    """What becomes of a strip."""

    @property
    def factor(self) -> int:
        """Rows and columns of the result for one of the strip."""
        ...

    @property
    def frames(self) -> int:
        """Frames of the result for one of the strip."""
        ...

    def __call__(self, strip: torch.Tensor, *, first: bool) -> torch.Tensor:
        """The strip, spread. `first`: whether it holds the first frame of the clip."""
        ...

    def channels(self, channels: int) -> int:
        """Channels of the result for so many of the strip."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffle:
    """Channels, ordered (c, frames, rows, columns) or so, to pixels.

    Source: diffusers autoencoder_kl_ltx.py `LTXVideoUpsampler3d.forward`, `LTXVideoDecoder3d.forward` (the patches);
    autoencoder_kl_wan.py `unpatchify`, `DupUp3D.forward`; autoencoder_kl_hunyuanvideo15.py `_dcae_upsample_rearrange`.
    """

    factor: int
    frames: int = 1
    #: Where c stands among the channels, and whether columns come before rows.
    order: Literal["channel first", "channel first, columns first", "channel last"] = "channel first"
    #: How often each channel is repeated before.
    repeats: int = 1
    #: How often all channels are repeated after.
    copies: int = 1
    #: Whether the first frame of the clip keeps its last copy only.
    drops: bool = True

    def __call__(self, strip: torch.Tensor, *, first: bool) -> torch.Tensor:
        if self.repeats > 1:
            strip = strip.repeat_interleave(self.repeats, dim=-1)
        frames, rows, width, channels = strip.shape
        f, s = self.frames, self.factor
        c = channels // (f * s * s)
        if self.order == "channel last":
            # F, H, W, f, h, w, c → F, f, H, h, W, w, c
            out = strip.view(frames, rows, width, f, s, s, c).permute(0, 3, 1, 4, 2, 5, 6)
        elif self.order == "channel first":
            # F, H, W, c, f, h, w → F, f, H, h, W, w, c
            out = strip.view(frames, rows, width, c, f, s, s).permute(0, 4, 1, 5, 2, 6, 3)
        else:
            # F, H, W, c, f, w, h → F, f, H, h, W, w, c
            out = strip.view(frames, rows, width, c, f, s, s).permute(0, 4, 1, 6, 2, 5, 3)
        out = out.reshape(frames * f, rows * s, width * s, c)
        if first and self.drops:
            out = out[f - 1 :]
        return out.repeat(1, 1, 1, self.copies) if self.copies > 1 else out

    def channels(self, channels: int) -> int:
        return channels * self.repeats // (self.frames * self.factor**2) * self.copies


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstApart:
    """Channels ordered (frames, rows, columns, c); the first frame's are (rows, columns, c) with twice the c.

    Source: diffusers autoencoder_kl_hunyuanvideo15.py `HunyuanVideo15Upsample.forward` (add_temporal_upsample).
    """

    #: Of the input added to the result: how often each channel is repeated. 0: this is the result itself, whose first
    #: frame keeps the first half of its channels.
    repeats: int = 0
    factor: int = 2
    frames: int = 2

    def __call__(self, strip: torch.Tensor, *, first: bool) -> torch.Tensor:
        following = Shuffle(factor=2, frames=2, order="channel last", drops=False)
        if not first:
            return self._repeated(following(strip, first=False), self.repeats)
        alone = Shuffle(factor=2, order="channel last")(strip[:1], first=True)
        alone = self._repeated(alone, self.repeats // 2) if self.repeats else alone[..., : alone.shape[-1] // 2]
        if len(strip) == 1:
            return alone.contiguous()
        return torch.cat([alone, self._repeated(following(strip[1:], first=False), self.repeats)])

    def channels(self, channels: int) -> int:
        return channels // 8 * max(1, self.repeats)

    @staticmethod
    def _repeated(strip: torch.Tensor, repeats: int) -> torch.Tensor:
        return strip.repeat_interleave(repeats, dim=-1) if repeats > 1 else strip


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeated:
    """Each channel so many times."""

    repeats: int
    factor: int = 1
    frames: int = 1

    def __call__(self, strip: torch.Tensor, *, first: bool) -> torch.Tensor:
        return strip.repeat_interleave(self.repeats, dim=-1)

    def channels(self, channels: int) -> int:
        return channels * self.repeats
