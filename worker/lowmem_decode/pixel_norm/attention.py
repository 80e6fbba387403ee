"""Self-attention of the mid-block, frame by frame, at latent resolution.

A frame's queries see that frame, or that frame and all before it; so no mask is needed, and no matrix of all frames by
all frames ever exists. Where no fused kernel takes the channels of one head, a frame's queries go in chunks.
"""

from __future__ import annotations

import torch

from worker.lowmem_decode.attention import attend, query_chunk
from worker.lowmem_decode.pixel_norm.kernels import pointwise
from worker.lowmem_decode.pixel_norm.steps import Attention


class AttentionRun:
    """The attention of one clip, over its groups of frames."""

    def __init__(self, block: Attention, *, frames: int, score_bytes: int) -> None:
        """Args:
        block: its weights.
        frames: of the clip.
        score_bytes: memory the scores of one chunk may take, on CUDA.
        """
        self._block = block
        self._frames = frames
        self._score_bytes = score_bytes
        self._seen = 0
        #: Keys and values of the frames so far, (2, 1, 1, F · H · W, C), where later frames see them.
        self._known: torch.Tensor | None = None

    def __call__(self, frames: torch.Tensor) -> None:
        """Adds to (F, H, W, C), in place.

        Source: diffusers autoencoder_kl_wan.py `WanAttentionBlock.forward`, autoencoder_kl_hunyuanvideo15.py
        `HunyuanVideo15AttnBlock.forward`.
        """
        block = self._block
        for frame in frames:
            height, width, channels = frame.shape
            normed = block.norm(frame).reshape(1, 1, height * width, channels)
            projected = [pointwise(conv, normed) for conv in block.projections]
            del normed
            query, key, value = projected if len(projected) == 3 else projected[0].chunk(3, dim=-1)
            del projected
            if block.over_frames:
                key, value = self._with_those_before(key, value)
            chunk = query_chunk(key.shape[2], device=frame.device, score_bytes=self._score_bytes)
            attended = attend(query, key, value, chunk=chunk)
            frame.add_(pointwise(block.out, attended).view(height, width, channels))

    def _with_those_before(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = key.shape[2]
        if self._known is None:
            self._known = key.new_empty(2, 1, 1, self._frames * pixels, key.shape[3])
        start, self._seen = self._seen, self._seen + pixels
        for known, new in zip(self._known, (key, value), strict=True):
            known[:, :, start : self._seen] = new
        return self._known[0, :, :, : self._seen], self._known[1, :, :, : self._seen]
