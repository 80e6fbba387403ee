"""What a convolution does to a window of rows.

A window is (frames, rows, W, C): the rows of a strip with one more above and below, and the frames with those that the
convolution sees beside them. A convolution over three frames is run as one over pictures whose channels are those of
the three, one after the other: the sums are the same, and kernels for pictures are faster on most devices.
Weights are brought into the form a kernel takes at each call: kept in that form, they would be there twice. Large ones
are brought there in parts, some output channels each: the widest convolutions of LTX-Video and HunyuanVideo 1.5 have
weights of 226 MiB and more in float32, several times what a small decode holds besides.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F

#: Weights that are brought into another form at once.
_PART_BYTES: Final = 16 << 20
#: Output channels of a part are a multiple of this, which kernels take well.
_PART_CHANNELS: Final = 32


class Kernel(Protocol):
    """A convolution as it is run."""

    #: Frames a window has more than its result.
    frames_beside: int
    #: Rows and columns of the result for one of the input.
    factor: int
    in_channels: int
    out_channels: int
    #: Most bytes of weights in another form at once.
    part_bytes: int

    def __call__(self, window: torch.Tensor, *, columns_padded: bool) -> torch.Tensor:
        """(f + frames_beside, h + 2, W, C) to (f, h · factor, W · factor, out_channels).

        Args:
            window: as above. A single frame of a kernel over three: the two before it are zeros.
            columns_padded: whether the window has a column more on either side; otherwise they are zeros.
        """
        ...


class Conv3x3x3:
    """Three frames, three rows, three columns."""

    frames_beside = 2
    factor = 1

    def __init__(self, conv: Any) -> None:
        self.conv = conv
        self.in_channels = int(conv.in_channels)
        self.out_channels = int(conv.out_channels)
        self.part_bytes = _channels_of_part(conv.weight) * _bytes_of_channel(conv.weight)

    def __call__(self, window: torch.Tensor, *, columns_padded: bool) -> torch.Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        if len(window) == 1:  # zeros times the other weights are zeros
            pictures, weight = window, weight[:, :, 2:]
        else:
            frames = len(window) - 2
            pictures = torch.cat([window[:frames], window[1 : frames + 1], window[2:]], dim=-1)
        step, columns = _channels_of_part(weight), 0 if columns_padded else 1
        if step == self.out_channels:
            return _convolved(pictures, _as_pictures(weight), bias, columns=columns)
        out: torch.Tensor | None = None
        for start in range(0, self.out_channels, step):
            part = slice(start, start + step)
            made = _convolved(
                pictures, _as_pictures(weight[part]), None if bias is None else bias[part], columns=columns
            )
            if out is None:
                out = made.new_empty(*made.shape[:3], self.out_channels)
            out[..., part] = made
        assert out is not None
        return out


class NearestConv3x3:
    """Nearest-neighbour upsample by two, then a 3×3 convolution with padding=1, frame by frame.

    An output pixel sees only 2×2 different input pixels, so four kernels of 2×2 whose weights are sums of the nine do
    the same with 4/9 of the multiplications. Not in half precision: the sums would be rounded where the nine are not,
    and the result would be further from the pipeline's than its own rounding.

    Source of what it replaces: diffusers autoencoder_kl_wan.py `WanResample` (`resample`).
    """

    frames_beside = 0
    factor = 2

    def __init__(self, conv: Any) -> None:
        self.conv = conv
        self.in_channels = int(conv.in_channels)
        self.out_channels = int(conv.out_channels)
        self.part_bytes = conv.weight.numel() * conv.weight.element_size()

    def __call__(self, window: torch.Tensor, *, columns_padded: bool) -> torch.Tensor:
        assert not columns_padded
        if self.conv.weight.dtype is torch.float32:
            return self._folded(window)
        # of the repeated rows, the outermost of the window's first and last row are not seen
        repeated = window.repeat_interleave(2, dim=1)[:, 1:-1].repeat_interleave(2, dim=2)
        return _convolved(repeated, self.conv.weight, self.conv.bias, columns=1)

    def _folded(self, window: torch.Tensor) -> torch.Tensor:
        frames, height, width, _ = window.shape
        height -= 2
        conv = self.conv
        bias = None if conv.bias is None else torch.cat([conv.bias, conv.bias])
        out = window.new_empty(frames, height, 2, width, 2, self.out_channels)
        # Output row 2i sees input rows i-1, i, i; row 2i+1 sees i, i, i+1. The same for columns.
        for odd, taps in enumerate(_pairs(conv.weight, dim=2)):
            both = _convolved(window[:, odd : odd + height + 1], torch.cat(_pairs(taps, dim=3)), bias, columns=1)
            out[:, :, odd, :, 0] = both[:, :, :width, : self.out_channels]
            out[:, :, odd, :, 1] = both[:, :, 1:, self.out_channels :]
        return out.view(frames, height * 2, width * 2, self.out_channels)


def frames_conv(conv: Any, window: torch.Tensor) -> torch.Tensor:
    """A convolution over three frames of a pixel: (f + 2, h, W, C) to (f, h, W, out_channels)."""
    frames = len(window) - 2
    stacked = torch.cat([window[:frames], window[1 : frames + 1], window[2:]], dim=-1)
    return F.linear(stacked, conv.weight[..., 0, 0].transpose(1, 2).flatten(1), conv.bias)


def pointwise(conv: Any, strip: torch.Tensor) -> torch.Tensor:
    """A convolution of one pixel."""
    return F.linear(strip, conv.weight.flatten(1), conv.bias)


def _bytes_of_channel(weight: torch.Tensor) -> int:
    """Bytes of the weights of one output channel."""
    return weight[0].numel() * weight.element_size()


def _channels_of_part(weight: torch.Tensor) -> int:
    """Output channels whose weights are brought into another form at once."""
    fitting = _PART_BYTES // _bytes_of_channel(weight) // _PART_CHANNELS * _PART_CHANNELS
    return min(len(weight), max(_PART_CHANNELS, fitting))


def _as_pictures(weight: torch.Tensor) -> torch.Tensor:
    """(O, C, frames, rows, columns) to (O, frames · C, rows, columns), channels_last: in one copy."""
    channels, _, _, rows, columns = weight.shape
    laid = weight.permute(0, 3, 4, 2, 1).reshape(channels, rows, columns, -1)
    return laid.permute(0, 3, 1, 2)


def _convolved(
    pictures: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, columns: int
) -> torch.Tensor:
    """(n, h, W, C) to (n, h', W', O)."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(pictures.permute(0, 3, 1, 2), weight, bias, padding=(0, columns))
    return out.permute(0, 2, 3, 1).contiguous()


def _pairs(taps: torch.Tensor, *, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three taps as the two of the even output positions and the two of the odd ones."""
    first, middle, last = torch.split(taps, 1, dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)
