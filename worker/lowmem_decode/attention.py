"""Self-attention of the mid-block: over the whole frame, its queries in chunks.

A query's result does not depend on the other queries, so chunks change nothing but the memory of the scores, where
torch makes them at all: its CPU kernel does not, and on CUDA no fused kernel takes the 512 channels of one head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from worker.lowmem_decode.group_norm import Affine, normalise
from worker.lowmem_decode.steps import Attention

#: Bytes of a score while they are made: themselves and their softmax, both in float32.
_BYTES_PER_SCORE = 8


def run_attention(block: Attention, rows: torch.Tensor, *, affine: Affine | None, score_bytes: int) -> torch.Tensor:
    """Runs the block.

    Args:
        block: its weights.
        rows: (H, W, C).
        affine: the norm before it, with the statistics of `rows`; None if there is none.
        score_bytes: memory the scores of one chunk may take.

    Returns:
        (H, W, C), `rows` itself overwritten if it is added to the result.

    Source: diffusers attention_processor.py `AttnProcessor2_0`.
    """
    height, width, channels = rows.shape
    normed = rows
    if affine is not None:
        normed = torch.empty_like(rows)
        normalise(rows, affine, out=normed, silu=False)
    tokens = normed.reshape(1, height * width, channels)
    query, key, value = (
        _split(_project(layer, tokens), block.heads) for layer in (block.query, block.key, block.value)
    )
    del normed, tokens
    chunk = query_chunk(height * width, device=rows.device, score_bytes=score_bytes // block.heads)
    attended = torch.cat(
        [F.scaled_dot_product_attention(part, key, value) for part in torch.split(query, chunk, dim=2)], dim=2
    )
    # 1, heads, L, C / heads → H, W, C
    merged = attended.transpose(1, 2).reshape(height, width, -1)
    out = _project(block.out, merged)
    if block.residual:
        out = rows.add_(out)
    return out if block.scale == 1.0 else out.div_(block.scale)


def query_chunk(tokens: int, *, device: torch.device, score_bytes: int) -> int:
    """Queries of one chunk."""
    if device.type == "cpu":
        return tokens
    return max(1, min(tokens, score_bytes // (tokens * _BYTES_PER_SCORE)))


def _project(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


def _split(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(1, L, C) to (1, heads, L, C / heads)."""
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)
