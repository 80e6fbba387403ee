"""Self-attention of the mid-block: over the whole frame, its queries in chunks.

Of a clip, over the frame and those before it: then the queries of a frame are a chunk, and the frames after it are left
out of the keys instead of being masked.

A query's result does not depend on the other queries, so chunks change nothing but the memory of the scores, where
torch makes them at all. Its CPU kernel does not. On CUDA its memory-efficient kernel does not either, whatever the
channels of a head, if they are a multiple of 8 (aten sdp_utils.cpp `check_head_dim_size_mem_efficient`); FlashAttention
ends at 256, and what is left makes all scores.
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
        rows: (H, W, C), or (H, T, W, C) of a clip.
        affine: the norm before it, with the statistics of `rows`; None if there is none.
        score_bytes: memory the scores of one chunk may take.

    Returns:
        Its shape, `rows` itself overwritten if it is added to the result.

    Source: diffusers attention_processor.py `AttnProcessor2_0`; autoencoder_kl_hunyuan_video.py
    `prepare_causal_attention_mask`.
    """
    normed = rows
    if affine is not None:
        normed = torch.empty_like(rows)
        normalise(rows, affine, out=normed, silu=False)
    frames = normed[:, None] if rows.ndim == 3 else normed
    # H, T, W, C → 1, T·H·W, C
    tokens = frames.transpose(0, 1).reshape(1, -1, rows.shape[-1])
    query, key, value = (
        _split(_project(layer, tokens), block.heads) for layer in (block.query, block.key, block.value)
    )
    height, count, width, _ = frames.shape
    del normed, tokens, frames
    chunk = query_chunk(query.shape[2], device=rows.device, score_bytes=score_bytes // block.heads)
    attended = [
        attend(query[:, :, end - height * width : end], key[:, :, :end], value[:, :, :end], chunk=chunk)
        for end in range(height * width, query.shape[2] + 1, height * width)
    ]
    # 1, heads, L, C / heads → T, H, W, C → H, T, W, C
    merged = torch.cat(attended, dim=2).transpose(1, 2).reshape(count, height, width, -1).transpose(0, 1)
    out = _project(block.out, merged).reshape(rows.shape)
    if block.residual:
        out = rows.add_(out)
    return out if block.scale == 1.0 else out.div_(block.scale)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, chunk: int) -> torch.Tensor:
    """Attention of (B, heads, L, C) to (B, heads, S, C); scores in memory are those of `chunk` queries, or none."""
    if chunk >= query.shape[2] or _makes_no_scores(query, key, value):
        return F.scaled_dot_product_attention(query, key, value)
    parts = [F.scaled_dot_product_attention(part, key, value) for part in torch.split(query, chunk, dim=2)]
    return torch.cat(parts, dim=2)


def _makes_no_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a fused kernel of torch takes these."""
    if query.device.type != "cuda":
        return query.device.type == "cpu"
    given = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return torch.backends.cuda.can_use_efficient_attention(given) or torch.backends.cuda.can_use_flash_attention(given)


def query_chunk(tokens: int, *, device: torch.device, score_bytes: int) -> int:
    """Queries of one chunk, where their scores are in memory."""
    if device.type == "cpu":
        return tokens
    return max(1, min(tokens, score_bytes // (tokens * _BYTES_PER_SCORE)))


def _project(layer: Any, tokens: torch.Tensor) -> torch.Tensor:
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)


def _split(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """(1, L, C) to (1, heads, L, C / heads)."""
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)
