"""CogVideoX's norm: a GroupNorm, scaled and shifted by what the latents say, pixel by pixel.

Scale and shift are products with the latents, enlarged to the activation's size. Enlarging repeats pixels, so the
products are made at the latents' size, a row at a time, and spread over what they apply to.

Source: diffusers autoencoder_kl_cogvideox.py `CogVideoXSpatialNorm3D`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from worker.lowmem_decode.group_norm import Affine, normalise
from worker.lowmem_decode.steps import SpatialNorm


class ConditionedPass:
    """Writes the normalised rows of an activation, and SiLU of them. One use: from its first row to its last."""

    def __init__(
        self, norm: SpatialNorm, affine: Affine, latents: torch.Tensor, *, height: int, inner: tuple[int, ...]
    ) -> None:
        """Args:
        norm: its weights.
        affine: its GroupNorm, with the statistics of the activation.
        latents: (h, t, w, C).
        height: rows of the activation.
        inner: a row of it, (T, W).
        """
        self._norm = norm
        self._affine = affine
        self._latents = latents
        self._enlarged = height // len(latents)
        self._columns = inner[1] // latents.shape[2]
        self._order = _enlarged_frames(latents.shape[1], inner[0], device=latents.device)
        self._top = 0

    def __call__(self, strip: torch.Tensor, room: torch.Tensor) -> None:
        """Takes the next rows (h, T, W, C) and writes to `room`."""
        normalise(strip, self._affine, out=room, silu=False)
        end = self._top + len(strip)
        at = self._top
        while at < end:
            row, inside = divmod(at, self._enlarged)
            count = min(end - at, self._enlarged - inside)
            self._modulate(room[at - self._top : at - self._top + count], self._latents[row])
            at += count
        self._top = end
        F.silu(room, inplace=True)

    def _modulate(self, rows: torch.Tensor, latents: torch.Tensor) -> None:
        """Rows (n, T, W, C) by one row of latents (t, w, C)."""
        count, frames, width, channels = rows.shape
        # W → w, the columns of one latent
        spread = rows.view(count, frames, width // self._columns, self._columns, channels)
        for conv, apply in ((self._norm.scale, spread.mul_), (self._norm.shift, spread.add_)):
            made = F.linear(latents, conv.weight.flatten(1), conv.bias)
            apply(made[self._order][:, :, None])


def _enlarged_frames(few: int, many: int, *, device: torch.device) -> torch.Tensor:
    """Which of the latents' frames each frame of an activation belongs to."""
    if many > 1 and many % 2 == 1:  # the first frame is alone
        rest = torch.arange(many - 1, device=device) * (few - 1) // (many - 1) + 1
        return torch.cat([rest.new_zeros(1), rest])
    return torch.arange(many, device=device) * few // many
