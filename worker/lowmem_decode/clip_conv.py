"""Convolutions over the rows of a clip, (rows, T, W, C), causal in time.

Torch is given one over pictures whose channels are those of a frame and of the two before it, one after the other: the
sums are the same, and kernels for pictures are faster on most devices. (On a CPU torch leaves oneDNN for its own slow
kernel where a window of a clip has few rows.) The frames before a frame, and the columns beside the first and the last,
stand in the window itself. The frames are those of the group before, or the first frame repeated; the columns, and the
rows above and below, are zeros or repeat the edge, as diffusers pads them.

A nearest-neighbour upsample before a convolution is folded into it as `UpsampledConv3x3` does, over time as well, where
the first frame stays one: frame 2k-1 and frame 2k of its result both repeat frame k, so two taps of three fall on one
frame. CogVideoX convolves its upsampled frames one by one, so they are repeated afterwards.

Sources: diffusers autoencoder_kl_hunyuan_video.py `HunyuanVideoCausalConv3d`, `HunyuanVideoUpsampleCausal3D`,
autoencoder_kl_cogvideox.py `CogVideoXCausalConv3d` (Mochi's has pad_mode "replicate"), upsampling.py
`CogVideoXUpsample3D`, autoencoder_kl_mochi.py `MochiUpBlock3D`.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F

from worker.lowmem_decode.frame_caches import Past
from worker.lowmem_decode.row_conv import Border, ZeroRows, pairs

#: Frames a 3×3×3 convolution sees before a frame.
PAST: Final = 2


class FramesBefore:
    """Two frames before the first, a row above and below, a column on either side."""

    def __init__(self, *, past: Past | None = None, zeros: bool = False) -> None:
        """Args:
        past: where the frames come from, and where the last two go to; None: the first frame is repeated.
        zeros: what rows and columns outside are; False: those at the edge once more.
        """
        self._past = past
        self._zeros = zeros
        self._top = 0

    def shape(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        frames, width = inner
        return frames + PAST, width + 2

    def inside(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, PAST:, 1:-1]

    def close(self, rows: torch.Tensor) -> None:
        if self._past is None or not self._past.recall(rows[:, :PAST, 1:-1], top=self._top):
            rows[:, :PAST] = rows[:, PAST : PAST + 1]
        if self._past is not None and self._past.keeps:
            self._past.note(rows[:, -PAST:, 1:-1], top=self._top)
        self._top += len(rows)
        rows[:, :, 0] = 0 if self._zeros else rows[:, :, 1]
        rows[:, :, -1] = 0 if self._zeros else rows[:, :, -2]

    def outside(self, row: torch.Tensor, edge: torch.Tensor) -> None:
        if self._zeros:
            row.zero_()
        else:
            row.copy_(edge)


class ZeroEdges:
    """A row of zeros above and below, a column of zeros on either side."""

    def shape(self, inner: tuple[int, ...]) -> tuple[int, ...]:
        frames, width = inner
        return frames, width + 2

    def inside(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:, :, 1:-1]

    def close(self, rows: torch.Tensor) -> None:
        rows[:, :, 0] = 0
        rows[:, :, -1] = 0

    def outside(self, row: torch.Tensor, edge: torch.Tensor) -> None:
        row.zero_()


class ClipConv:
    """A 3×3×3 convolution, causal in time."""

    factor = 1

    def __init__(self, conv: Any, *, past: Past | None = None, zeros: bool = False) -> None:
        """Args:
        conv: its weights.
        past: as for `FramesBefore`.
        zeros: likewise.
        """
        self._past = past
        self._zeros = zeros
        self._weight = _over_pictures(conv.weight)
        self._bias = conv.bias
        self.in_channels = int(conv.in_channels)
        self.out_channels = int(conv.out_channels)

    def border(self) -> Border:
        return FramesBefore(past=self._past, zeros=self._zeros)

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        return _convolve(window, self._weight, self._bias)


class UpsampledClipConv:
    """Nearest-neighbour upsample of rows, columns and maybe frames, then such a convolution."""

    factor = 2
    border = FramesBefore

    def __init__(self, conv: Any, *, twice_the_frames: bool) -> None:
        self.in_channels = int(conv.in_channels)
        self.out_channels = int(conv.out_channels)
        self._twice = twice_the_frames
        dtype = conv.weight.dtype
        weight = conv.weight.float()
        # For odd and for even output rows: output channels of (frame, column) phases one after the other.
        self._weights = []
        for by_row in pairs(weight, dim=3):
            by_frame = pairs(by_row, dim=2) if twice_the_frames else (by_row,)
            phases = [by_column for taps in by_frame for by_column in pairs(taps, dim=4)]
            self._weights.append(_over_pictures(torch.cat(phases).to(dtype)))
        self._bias = None if conv.bias is None else conv.bias.repeat(len(phases))

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        height, padded, width, _ = window.shape
        height, frames, width = height - 2, padded - PAST, width - 2
        grown, channels = 2 * frames - 1 if self._twice else frames, self.out_channels
        out = window.new_empty(height, 2, grown, width, 2, channels)
        if self._twice:
            window = window[:, 1:]  # two taps see one frame before a frame
        for odd, weight in enumerate(self._weights):
            made = _convolve(window[odd : odd + height + 1], weight, self._bias)  # (h, T, W + 1, phases · C)
            for phase, part in enumerate(torch.split(made, channels, dim=3)):
                odd_frame, right = divmod(phase, 2)
                columns = part[:, :, right : right + width]
                if not self._twice:
                    out[:, odd, :, :, right] = columns
                elif odd_frame == 0:
                    out[:, odd, 0::2, :, right] = columns
                else:
                    out[:, odd, 1::2, :, right] = columns[:, 1:]
        return out.view(height * 2, grown, width * 2, channels)


class FramewiseUpsampledConv:
    """Nearest-neighbour upsample of rows, columns and maybe frames, then a 3×3 convolution of each frame."""

    factor = 2
    border = ZeroEdges

    def __init__(self, conv: Any, *, compress_time: bool) -> None:
        self.in_channels = int(conv.in_channels)
        self.out_channels = int(conv.out_channels)
        self._compress_time = compress_time
        dtype = conv.weight.dtype
        # for odd and for even output rows: output channels of columns' phases
        self._weights = [
            _over_pictures(torch.cat(pairs(by_row, dim=4)).to(dtype))
            for by_row in pairs(conv.weight.float()[:, :, None], dim=3)
        ]
        self._bias = None if conv.bias is None else conv.bias.repeat(2)

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        height, frames, width, _ = window.shape
        height, width = height - 2, width - 2
        order = repeated_frames(frames, device=window.device) if self._compress_time else None
        grown = frames if order is None else len(order)
        out = window.new_empty(height, 2, grown, width, 2, self.out_channels)
        for odd, weight in enumerate(self._weights):
            made = _convolve(window[odd : odd + height + 1], weight, self._bias)
            for right, part in enumerate(torch.split(made, self.out_channels, dim=3)):
                columns = part[:, :, right : right + width]
                out[:, odd, :, :, right] = columns if order is None else columns[:, order]
        return out.view(height * 2, grown, width * 2, self.out_channels)


class Unfolded:
    """A product with a matrix whose result's channels become frames, rows and columns."""

    border = ZeroRows

    def __init__(self, linear: Any, *, frames: int, rows: int) -> None:
        self._linear = linear
        self._frames = frames
        self.factor = rows
        self.in_channels = int(linear.in_features)
        self.out_channels = int(linear.out_features) // (frames * rows * rows)

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        rows = F.linear(window[1:-1], self._linear.weight, self._linear.bias)
        height, frames, width, _ = rows.shape
        # h, T, W, (c, st, sh, sw) → h, sh, T, st, W, sw, c
        parts = rows.view(height, frames, width, self.out_channels, self._frames, self.factor, self.factor)
        spread = parts.permute(0, 5, 1, 4, 2, 6, 3)
        return spread.reshape(height * self.factor, frames * self._frames, width * self.factor, self.out_channels)


class Pointwise:
    """A product with a matrix, as a kernel."""

    factor = 1
    border = ZeroRows

    def __init__(self, linear: Any) -> None:
        self._linear = linear
        self.in_channels = int(linear.in_features)
        self.out_channels = int(linear.out_features)

    def __call__(self, window: torch.Tensor) -> torch.Tensor:
        return F.linear(window[1:-1], self._linear.weight, self._linear.bias)


def repeated_frames(frames: int, *, device: torch.device) -> torch.Tensor:
    """Which frame each frame of CogVideoX's upsample over time repeats: all twice, of an odd number the first once."""
    order = torch.arange(frames, device=device)
    if frames == 1:
        return order
    return order.repeat_interleave(2)[frames % 2 :]


def _over_pictures(weight: torch.Tensor) -> torch.Tensor:
    """(O, I, t, h, w) to (O, t · I, h, w), channels_last."""
    channels, _, _, rows, columns = weight.shape
    laid = weight.permute(0, 3, 4, 2, 1).reshape(channels, rows, columns, -1)
    return laid.permute(0, 3, 1, 2)


def _convolve(window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(h, T, W, C), borders and all, to what is left of it."""
    height, padded, width, channels = window.shape
    seen = weight.shape[1] // channels
    frames = padded - seen + 1
    pictures = window.new_empty(frames, height, width, seen * channels)
    for before, part in enumerate(torch.split(pictures, channels, dim=3)):
        part.copy_(window[:, before : before + frames].transpose(0, 1))
    # (T, O, h, w) → h, T, w, O
    return F.conv2d(pictures.permute(0, 3, 1, 2), weight, bias).permute(2, 0, 3, 1)
