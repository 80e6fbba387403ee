"""Triton kernels: a normalisation and SiLU in one go, over activations of either memory format.

Group norm takes three launches. `_channel_statistics` reads the activation once: mean and sum of squared deviations of
each channel in each stretch of positions, block by block, each block in two passes over what lies in registers, blocks
merged by Chan, Golub and LeVeque's formula. `_merge` joins a group's stretches and channels and folds weight and bias
into one factor and one summand for each channel. `_apply` reads the activation again and writes the result. All
arithmetic is float32, so that no sum of squares cancels, whatever the activation's dtype.

RMS norm is over the channels of one position, so one launch does all.

A position is a pixel, of all frames. Strides say where channels and positions lie: (positions, 1) as diffusers leaves
an activation, (1, channels) for channels_last and channels_last_3d.

This module imports triton: CUDA builds of torch bring it along, others do not. `worker.fast_path.norm_silu` decides.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl

#: Elements of a tile: 16 to 32 in each of the 128 threads a program has, in float32 they stay in registers.
_TILE: Final = 4096
#: Channels of a tile of channels_last: 128 bytes of float16, one line of the cache, and more.
_TILE_CHANNELS: Final = 64
#: Most stretches of an activation. Programs enough for every multiprocessor; `_merge` reads as many numbers a channel.
_MOST_STRETCHES: Final = 512
#: Fewest positions of a stretch, so that a small activation is not cut to pieces.
_FEWEST_POSITIONS: Final = 1024
#: Positions are counted in 32 bits by a program; pointers are widened where a sample is added.
_MOST_POSITIONS: Final = 2**31 - 1
#: What the last dimension of a grid takes.
_MOST_SAMPLES: Final = 65535


@triton.jit
def _channel_statistics(
    x,
    means,
    squares,
    channels,
    positions,
    stride_sample,
    stride_channel,
    stride_position,
    stretch,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """means, squares: (samples, stretches, channels) float32."""
    part = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    here = c < channels
    first = part * stretch
    last = tl.minimum(first + stretch, positions)
    column = x + sample * stride_sample + c.to(tl.int64)[:, None] * stride_channel
    mean = tl.zeros((TILE_C,), tl.float32)
    square = tl.zeros((TILE_C,), tl.float32)
    count = 0.0
    for start in range(first, last, TILE_P):
        p = start + tl.arange(0, TILE_P)
        inside = here[:, None] & (p < last)[None, :]
        values = tl.load(column + p.to(tl.int64)[None, :] * stride_position, mask=inside, other=0.0).to(tl.float32)
        fresh = tl.minimum(last - start, TILE_P).to(tl.float32)
        tile_mean = tl.sum(values, axis=1) / fresh
        centred = tl.where(inside, values - tile_mean[:, None], 0.0)
        apart = tile_mean - mean
        both = count + fresh
        square += tl.sum(centred * centred, axis=1) + apart * apart * (count * fresh / both)
        mean += apart * (fresh / both)
        count = both
    out = (sample * tl.num_programs(0) + part) * channels + c
    tl.store(means + out, mean, mask=here)
    tl.store(squares + out, square, mask=here)


# The number of stretches differs with the size of a picture, and each kind of number (1, one that 16 divides, any
# other) would be a kernel of its own, compiled within the first decode of its size.
@triton.jit(do_not_specialize=["positions", "stretch", "stretches"])
def _merge(
    means,
    squares,
    weight,
    bias,
    scale,
    shift,
    channels,
    positions,
    stretch,
    stretches,
    per_group,
    eps,
    TILE_C: tl.constexpr,
    TILE_S: tl.constexpr,
):
    """scale, shift: (samples, channels) float32, so that the norm is x · scale + shift."""
    group = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, TILE_C)
    c = group * per_group + inner
    here = inner < per_group
    total = positions.to(tl.float32) * per_group
    mean = 0.0
    for start in range(0, stretches, TILE_S):
        s = start + tl.arange(0, TILE_S)
        inside = (s < stretches)[:, None] & here[None, :]
        at = (sample * stretches + s)[:, None] * channels + c[None, :]
        counts = tl.maximum(tl.minimum(positions - s * stretch, stretch), 0).to(tl.float32)
        mean += tl.sum(tl.load(means + at, mask=inside, other=0.0) * (counts / total)[:, None])
    deviation = 0.0
    for start in range(0, stretches, TILE_S):
        s = start + tl.arange(0, TILE_S)
        inside = (s < stretches)[:, None] & here[None, :]
        at = (sample * stretches + s)[:, None] * channels + c[None, :]
        counts = tl.maximum(tl.minimum(positions - s * stretch, stretch), 0).to(tl.float32)
        apart = tl.load(means + at, mask=inside, other=0.0) - mean
        between = tl.where(inside, apart * apart * counts[:, None], 0.0)
        deviation += tl.sum(tl.load(squares + at, mask=inside, other=0.0) + between)
    factor = tl.load(weight + c, mask=here, other=0.0).to(tl.float32) / tl.sqrt(deviation / total + eps)
    summand = tl.load(bias + c, mask=here, other=0.0).to(tl.float32) - mean * factor
    tl.store(scale + sample * channels + c, factor, mask=here)
    tl.store(shift + sample * channels + c, summand, mask=here)


@triton.jit
def _apply(
    x,
    out,
    scale,
    shift,
    channels,
    positions,
    stride_sample,
    stride_channel,
    stride_position,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """out = silu(x · scale + shift), laid out as x."""
    sample = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    p = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    here = c < channels
    inside = here[:, None] & (p < positions)[None, :]
    at = sample * stride_sample + c.to(tl.int64)[:, None] * stride_channel + p.to(tl.int64)[None, :] * stride_position
    factor = tl.load(scale + sample * channels + c, mask=here, other=0.0)
    summand = tl.load(shift + sample * channels + c, mask=here, other=0.0)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None] + summand[:, None]
    values = values / (1.0 + tl.exp(-values))
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rms_silu(
    x,
    out,
    weight,
    bias,
    channels,
    positions,
    stride_sample,
    stride_channel,
    stride_position,
    scale,
    eps,
    HAS_BIAS: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_P: tl.constexpr,
):
    """out = silu(x ÷ max(‖x‖, eps) · scale · weight + bias), the norm over the channels of a position."""
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, TILE_C)
    p = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    here = c < channels
    inside = here[:, None] & (p < positions)[None, :]
    at = sample * stride_sample + c.to(tl.int64)[:, None] * stride_channel + p.to(tl.int64)[None, :] * stride_position
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(values * values, axis=0)), eps)
    factor = tl.load(weight + c, mask=here, other=0.0).to(tl.float32) * scale
    values = values * (1.0 / length)[None, :] * factor[:, None]
    if HAS_BIAS:
        values += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)[:, None]
    values = values / (1.0 + tl.exp(-values))
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, groups: int, eps: float
) -> torch.Tensor:
    """silu(group_norm(x)), laid out as `x`.

    Args:
        x: (N, C, …), contiguous or channels innermost, float16, bfloat16 or float32.
        weight: (C,).
        bias: (C,).
        groups: of channels.
        eps: added to the variance.
    """
    samples, channels, positions, strides = _geometry(x)
    tile_c, tile_p = _tile(channels, channels_innermost=strides[1] == 1)
    stretch = max(_FEWEST_POSITIONS, triton.cdiv(positions, _MOST_STRETCHES))
    stretch = triton.cdiv(stretch, tile_p) * tile_p
    stretches = triton.cdiv(positions, stretch)
    means = torch.empty((2, samples, stretches, channels), device=x.device, dtype=torch.float32)
    affine = torch.empty((2, samples, channels), device=x.device, dtype=torch.float32)
    out = torch.empty_like(x)  # keeps the strides of a dense tensor
    blocks = triton.cdiv(channels, tile_c)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # triton launches on the current device
        _channel_statistics[(stretches, blocks, samples)](
            x, means[0], means[1], channels, positions, *strides, stretch, TILE_C=tile_c, TILE_P=tile_p
        )
        per_group = channels // groups
        _merge[(groups, samples)](
            means[0],
            means[1],
            weight,
            bias,
            affine[0],
            affine[1],
            channels,
            positions,
            stretch,
            stretches,
            per_group,
            eps,
            TILE_C=triton.next_power_of_2(per_group),
            TILE_S=64,
        )
        _apply[(triton.cdiv(positions, tile_p), blocks, samples)](
            x, out, affine[0], affine[1], channels, positions, *strides, TILE_C=tile_c, TILE_P=tile_p
        )
    return out


def rms_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, scale: float, eps: float
) -> torch.Tensor:
    """silu(normalize(x, dim=1) · scale · weight + bias), laid out as `x`.

    Args:
        x: (N, C, …), contiguous or channels innermost, float16, bfloat16 or float32.
        weight: C numbers.
        bias: C numbers, or None.
        scale: √C, as the module has it.
        eps: the smallest length, as `torch.nn.functional.normalize` has it.
    """
    samples, channels, positions, strides = _geometry(x)
    tile_c = triton.next_power_of_2(channels)
    tile_p = max(1, _TILE // tile_c)
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _rms_silu[(triton.cdiv(positions, tile_p), samples)](
            x,
            out,
            weight,
            weight if bias is None else bias,
            channels,
            positions,
            *strides,
            scale,
            eps,
            HAS_BIAS=bias is not None,
            TILE_C=tile_c,
            TILE_P=tile_p,
        )
    return out


def takes(x: torch.Tensor) -> bool:
    """Whether the kernels can run on `x`: its layout and size are ones they know."""
    if x.shape[0] == 0 or x.shape[0] > _MOST_SAMPLES or layout_strides(x) is None:
        return False
    return 1 < x[0, 0].numel() <= _MOST_POSITIONS - _TILE  # a size of 1 is a constant to triton


def layout_strides(x: torch.Tensor) -> tuple[int, int] | None:
    """Strides of channel and position; None if `x` is neither contiguous nor channels_last."""
    positions, channels = x[0, 0].numel(), x.shape[1]
    if x.is_contiguous():
        return positions, 1
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d if x.ndim == 5 else None
    if last is not None and x.is_contiguous(memory_format=last):
        return 1, channels
    return None


def _geometry(x: torch.Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    strides = layout_strides(x)
    if strides is None:
        raise ValueError(f"an activation with strides {x.stride()} is neither contiguous nor channels_last")
    samples, channels = x.shape[:2]
    positions = x[0, 0].numel()
    return samples, channels, positions, (channels * positions, *strides)


def _tile(channels: int, *, channels_innermost: bool) -> tuple[int, int]:
    """Channels and positions of a tile; both powers of two."""
    tile_c: Any = min(triton.next_power_of_2(channels), _TILE_CHANNELS) if channels_innermost else 1
    return tile_c, _TILE // tile_c
