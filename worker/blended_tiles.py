"""Decode in tiles that share some of their pixels, and blend what they share: a pipeline's own way, and no compromise.

Source: diffusers pipelines/ltx/pipeline_ltx_i2v_long_multi_prompt.py
`LTXI2VLongMultiPromptPipeline.vae_decode_tiled`. The sums are made in its order, since other orders round otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

#: Keeps a pixel that no tile weighs from being divided by zero.
_TINY: Final = 1e-8


def decode_in_tiles(
    latents: torch.Tensor,
    *,
    tiles: tuple[int, int, int],
    spatial: int,
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The clips that tiles of latents make.

    Args:
        latents: (n, C, f, h, w).
        tiles: rows and columns of tiles, and the latent pixels by which they overlap.
        spatial: pixels per latent pixel.
        decode: a tile (n, C, f, h', w') to its frames (n, 3, F, H', W').

    Returns:
        (n, 3, F, H, W), float32, in [-1, 1].
    """
    rows, columns, overlap = tiles
    height, width = latents.shape[3] * spatial, latents.shape[4] * spatial
    blended: torch.Tensor | None = None
    weights = torch.zeros(height, width, device=latents.device)
    for row, (top, bottom) in enumerate(tile_spans(latents.shape[3], rows, overlap)):
        for column, (left, right) in enumerate(tile_spans(latents.shape[4], columns, overlap)):
            made = decode(latents[:, :, :, top:bottom, left:right]).float()
            if blended is None:
                blended = torch.zeros(*made.shape[:3], height, width, device=made.device)
            weight = torch.ones(made.shape[3:], device=made.device)
            _fade(weight.T, overlap * spatial, start=column > 0, end=column < columns - 1)
            _fade(weight, overlap * spatial, start=row > 0, end=row < rows - 1)
            place = (slice(top * spatial, bottom * spatial), slice(left * spatial, right * spatial))
            blended[:, :, :, *place] += made * weight
            weights[place] += weight
    assert blended is not None
    return (blended / (weights + _TINY)).clamp(-1, 1)


def tile_spans(size: int, count: int, overlap: int) -> list[tuple[int, int]]:
    """Start and end of each of `count` tiles along a side; the last takes what is left."""
    length = (size + (count - 1) * overlap) // count
    starts = [number * (length - overlap) for number in range(count)]
    return [(start, min(start + length, size)) for start in starts[:-1]] + [(starts[-1], size)]


def _fade(weight: torch.Tensor, overlap: int, *, start: bool, end: bool) -> None:
    """Weighs the first and the last `overlap` rows by how near they are to the tile's inside."""
    if overlap and start:
        weight[:overlap] *= torch.linspace(0, 1, overlap, device=weight.device)[:, None]
    if overlap and end:
        weight[-overlap:] *= torch.linspace(1, 0, overlap, device=weight.device)[:, None]
