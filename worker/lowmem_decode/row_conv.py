"""Convolutions that are fed rows from the top and give rows as soon as they are known.

Activations lie as (rows, W, C), those of a clip as (rows, T, W, C): a strip of rows is contiguous, and a convolution
takes it as it is (channels_last). A 3×3 convolution keeps its last two rows of input for the next strip, so no row is
computed twice at a border, and a strip of one row is as good as any. What stands above the first row and below the last
is up to the kernel's border: zeros, as padding=1 has it, or the same row once more. The kernels of clips are in
`clip_conv`.

A nearest-neighbour upsample by two before a 3×3 convolution is folded into it: an output pixel sees only 2×2 different
input pixels, so two 2×2 kernels (for even and for odd output rows, each for both columns) whose weights are sums of
the nine do the same with 4/9 of the multiplications, and the upsampled activation never exists.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F


class Border(Protocol):
    """What a kernel sees around the rows it is fed. One use: from the first row of an activation to its last."""

    def shape(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        """A row of a window, without channels, where a row of input is `inner`."""
        ...

    def inside(self, rows: torch.Tensor) -> torch.Tensor:
        """Where the input lies in rows of a window."""
        ...

    def close(self, rows: torch.Tensor) -> None:
        """Fills what lies around the input in these rows of a window."""
        ...

    def outside(self, row: torch.Tensor, edge: torch.Tensor) -> None:
        """Fills the row above the first, or below the last, whose own is `edge`."""
        ...


class Kernel(Protocol):
    """What is done to a window of rows."""

    in_channels: int
    out_channels: int
    #: Output rows for one of input.
    factor: int

    def border(self) -> Border:
        """What stands around the input."""
        ...

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        """(h + 2, …, in_channels) to (h · factor, …, out_channels)."""
        ...


class ZeroRows:
    """Rows of zeros above and below; the kernel sees to the columns itself."""

    def shape(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        return inner

    def inside(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def close(self, rows: torch.Tensor) -> None:
        return

    def outside(self, row: torch.Tensor, edge: torch.Tensor) -> None:
        row.zero_()


class Conv3x3:
    """A 3×3 convolution with padding=1."""

    factor = 1
    border = ZeroRows

    def __init__(self, conv: Any) -> None:
        self._weight = conv.weight.contiguous(memory_format=torch.channels_last)
        self._bias = conv.bias
        self.in_channels = int(conv.in_channels)
        self.out_channels = int(conv.out_channels)

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        return rows_of(F.conv2d(image_of(window), self._weight, self._bias, padding=(0, 1)))


class UpsampledConv3x3:
    """Nearest-neighbour upsample by two, then a 3×3 convolution with padding=1.

    Source of what it replaces: diffusers upsampling.py `Upsample2D.forward`.
    """

    factor = 2
    border = ZeroRows

    def __init__(self, conv: Any) -> None:
        self.in_channels = int(conv.in_channels)
        self.out_channels = int(conv.out_channels)
        dtype = conv.weight.dtype
        # Output row 2i sees input rows i-1, i, i; row 2i+1 sees i, i, i+1. The same for columns.
        by_row = pairs(conv.weight.float(), dim=2)
        self._weights = [
            torch.cat(pairs(taps, dim=3)).to(dtype).contiguous(memory_format=torch.channels_last) for taps in by_row
        ]
        self._bias = None if conv.bias is None else torch.cat([conv.bias, conv.bias])

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        height, width, _ = window.shape
        height -= 2
        out = window.new_empty(height, 2, width, 2, self.out_channels)
        for odd, weight in enumerate(self._weights):
            taken = window[odd : odd + height + 1]
            # (h, W + 1, 2·C): the even columns' kernel is right from column 0 on, the odd columns' from 1 on
            both = rows_of(F.conv2d(image_of(taken), weight, self._bias, padding=(0, 1)))
            out[:, odd, :, 0] = both[:, :width, : self.out_channels]
            out[:, odd, :, 1] = both[:, 1:, self.out_channels :]
        return out.view(height * 2, width * 2, self.out_channels)


class ShuffledConv3x3:
    """A 3×3 convolution whose channels become 2×2 pixels, plus the repeated input likewise.

    Source: diffusers autoencoder_kl_hunyuanimage.py `HunyuanImageUpsample.forward`.
    """

    factor = 2
    border = ZeroRows

    def __init__(self, conv: Any, *, repeats: int) -> None:
        self._conv = Conv3x3(conv)
        self._repeats = repeats
        self.in_channels = self._conv.in_channels
        self.out_channels = self._conv.out_channels // 4

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        shuffled = _to_pixels(self._conv(window))
        repeated = window[1:-1].repeat_interleave(self._repeats, dim=2)
        return shuffled.add_(_to_pixels(repeated))


class RowConv:
    """A kernel fed with rows. One use: from the first row of an activation to its last."""

    def __init__(self, kernel: Kernel, like: torch.Tensor, *, inner: tuple[int, ...], most_rows: int) -> None:
        """Args:
        kernel: what is done.
        like: dtype and device.
        inner: a row of the input, without channels.
        most_rows: most rows fed at once.
        """
        self._kernel = kernel
        self._border = kernel.border()
        # two rows kept, those fed, and the one below the last
        self._buffer = like.new_empty(most_rows + 3, *self._border.shape(inner), kernel.in_channels)
        self._held = 0

    def room(self, rows: int) -> torch.Tensor:
        """Where the next `rows` rows are to be written before `push`."""
        start = max(1, self._held)  # the first row is for what stands above
        return self._border.inside(self._buffer[start : start + rows])

    def push(self, rows: int, *, last: bool) -> torch.Tensor | None:
        """Takes the rows written to `room`.

        Args:
            rows: how many.
            last: whether the activation ends with them.

        Returns:
            The output rows that are known now and were not before; None if there are none.
        """
        start = max(1, self._held)
        self._border.close(self._buffer[start : start + rows])
        if self._held == 0:
            self._border.outside(self._buffer[0], self._buffer[1])
        self._held = start + rows
        if last:
            self._border.outside(self._buffer[self._held], self._buffer[self._held - 1])
            self._held += 1
        if self._held < 3:
            return None
        out = self._kernel(self._buffer[: self._held])
        if not last:
            self._buffer[0] = self._buffer[self._held - 2]  # in this order the two may be the second and the third
            self._buffer[1] = self._buffer[self._held - 1]
            self._held = 2
        return out


def image_of(rows: torch.Tensor) -> torch.Tensor:
    """(h, W, C) as (1, C, h, W), without a copy."""
    return rows.permute(2, 0, 1)[None]


def rows_of(image: torch.Tensor) -> torch.Tensor:
    """(1, C, h, W) as (h, W, C), without a copy if it is channels_last."""
    return image[0].permute(1, 2, 0)


def pairs(taps: torch.Tensor, *, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three taps as the two of the even output positions and the two of the odd ones."""
    first, middle, last = torch.split(taps, 1, dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


def _to_pixels(rows: torch.Tensor) -> torch.Tensor:
    """(h, W, 4·C), the channels ordered (r1, r2, c), to (2·h, 2·W, C)."""
    height, width, channels = rows.shape
    # h, W, r1, r2, c → h, r1, W, r2, c
    return (
        rows.reshape(height, width, 2, 2, channels // 4)
        .permute(0, 2, 1, 3, 4)
        .reshape(height * 2, width * 2, channels // 4)
    )
