"""GroupNorm over an activation that is seen a few rows at a time.

Mean and variance are those of the whole activation, or of each frame of it. Each piece gives its own mean and its own
sum of squared deviations, in float32 and in two passes; the pieces are merged by Chan, Golub and LeVeque's formula
(Updating formulae and a pairwise algorithm for computing sample variances, 1979), in float64 where the device has it.
No term cancels, and nothing is left out: neither the variance between the pieces' means, nor a padding pixel put in.

Pieces in float32 lie in one room, used again and again: of thousands of aligned blocks that come and go, glibc before
2.38 reuses few (its bug 14581), and its heap grows by tens of MiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F

#: Elements of a piece on a CPU: a piece and its float32 copy stay in a core's second-level cache (1 MB and up).
_PIECES_CPU: Final = (1 << 17,)
#: Elements of a piece elsewhere, the largest first: on an H200 (4.8 TB/s) a pass over the most of them in half
#: precision takes 3.5 µs, about what a kernel's start takes. Their float32 copies are small beside the activations of a
#: large picture only; for a smaller one, smaller pieces may leave the room in which an activation is kept.
_PIECES_ELSEWHERE: Final = (1 << 23, 1 << 21, 1 << 19)


@dataclass(frozen=True, kw_only=True, slots=True)
class Affine:
    """A GroupNorm whose statistics are known: y = x · scale + shift, in float32.

    Both are (C,), or (T, 1, C) where each frame has its own statistics.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    #: Elements that are normalised at a time; 0: as many as the device likes.
    piece_elements: int = 0


class GroupStatistics:
    """Mean and variance of the groups of channels of one activation."""

    def __init__(self, groups: int, *, per_frame: bool = False, piece_elements: int = 0) -> None:
        """Args:
        groups: of channels.
        per_frame: whether each frame of a clip has statistics of its own.
        piece_elements: elements taken in at a time; 0: as many as the device likes.
        """
        self._piece_elements = piece_elements
        self._groups = groups
        self._per_frame = per_frame
        self._counts: list[int] = []
        self._means: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []
        #: Where a piece is centred.
        self._room: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Takes in rows (h, W, C) or (h, T, W, C) that were not seen yet."""
        channels = rows.shape[-1]
        per_group = channels // self._groups
        over = (0, 2) if self._per_frame else tuple(range(rows.ndim - 1))
        parts = pieces(rows, self._piece_elements)
        if self._room is None or len(self._room) < len(parts[0]):
            self._room = torch.empty_like(parts[0], dtype=torch.float32)
        for piece in parts:
            count = piece.numel() // self._groups // (piece.shape[1] if self._per_frame else 1)
            mean = self._by_group(piece.sum(over, dtype=torch.float32)) / count
            # float32, whatever the activation is
            centred = torch.sub(piece, self._by_channel(mean, per_group), out=self._room[: len(piece)])
            squares = self._by_group(centred.square_().sum(over))
            self._counts.append(count)
            self._means.append(mean)
            self._squares.append(squares)

    def affine(self, norm: Any) -> Affine:
        """The GroupNorm `norm` with these statistics.

        Source: torch.nn.GroupNorm (biased variance, eps inside the root).
        """
        self._room = None
        device = self._means[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        means = torch.stack(self._means).to(wide)
        counts = torch.tensor(self._counts, dtype=wide, device=device).view(-1, *[1] * (means.ndim - 1))
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        between = ((means - mean).square() * counts).sum(0)
        variance = (torch.stack(self._squares).to(wide).sum(0) + between) / total
        per_group = norm.num_channels // self._groups
        scale = self._by_channel((variance + norm.eps).rsqrt(), per_group) * norm.weight.to(wide)
        shift = norm.bias.to(wide) - self._by_channel(mean, per_group) * scale
        return Affine(scale=scale.float(), shift=shift.float(), piece_elements=self._piece_elements)

    def _by_group(self, sums: torch.Tensor) -> torch.Tensor:
        """(…, C) to (…, groups)."""
        return sums.view(*sums.shape[:-1], self._groups, -1).sum(-1)

    def _by_channel(self, values: torch.Tensor, per_group: int) -> torch.Tensor:
        """(groups) to (C); (T, groups) to (T, 1, C), for every column."""
        spread = values.repeat_interleave(per_group, -1)
        return spread.unsqueeze(-2) if self._per_frame else spread


def normalise(rows: torch.Tensor, affine: Affine, *, out: torch.Tensor, silu: bool = True) -> None:
    """Writes the normalised rows, and SiLU of them, to `out`. May be in place.

    Both steps round to the activation's dtype, as `GroupNorm` and `SiLU` do one after the other.

    Args:
        rows: (h, W, C) or (h, T, W, C).
        affine: of the whole activation.
        out: the shape and dtype of `rows`.
        silu: whether SiLU follows.
    """
    parts = pieces(rows, affine.piece_elements)
    room = None if rows.dtype == torch.float32 else torch.empty_like(parts[0], dtype=torch.float32)
    for piece, target in zip(parts, pieces(out, affine.piece_elements), strict=True):
        if room is None:
            torch.addcmul(affine.shift, piece, affine.scale, out=target)
        else:
            wide = room[: len(piece)].copy_(piece)
            target.copy_(torch.addcmul(affine.shift, wide, affine.scale, out=wide))
        if silu:
            F.silu(target, inplace=True)


def pieces(rows: torch.Tensor, elements: int = 0) -> tuple[torch.Tensor, ...]:
    """Rows in pieces of so many elements; 0: of a size the device likes."""
    step = max(1, (elements or piece_sizes(rows.device)[0]) // rows[0].numel())
    return torch.split(rows, step)


def piece_sizes(device: torch.device) -> tuple[int, ...]:
    """Elements that a piece may have on this device, the best first."""
    return _PIECES_CPU if device.type == "cpu" else _PIECES_ELSEWHERE
