"""Large tensors a part at a time: what operators make in between takes several times the memory of a clip."""

from __future__ import annotations

from typing import Final

import torch

#: Elements of a part.
_ELEMENTS: Final = 1 << 23


def in_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(n, …) in parts of the first dimension, one at least; of the same number for tensors of as many elements."""
    return torch.split(tensor, max(1, _ELEMENTS // max(1, tensor[:1].numel()))) if len(tensor) else (tensor,)
