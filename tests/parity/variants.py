"""What other classes of a family are called with, beside what its first one is: a picture, a mask, and so on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from tests.parity.whole_pipelines import SMALL, Whole, pooled, small_picture


def holes() -> Image.Image:
    """A mask of `SMALL` size: two corners are painted anew."""
    blocks = np.kron([[255, 0], [0, 255]], np.ones((SMALL["height"] // 2, SMALL["width"] // 2)))
    return Image.fromarray(blocks.astype(np.uint8))


def one_pooled() -> torch.Tensor:
    """Pooled embeddings of one prompt."""
    return pooled()[:1]


PICTURE: Final[Mapping[str, Any]] = {"image": small_picture}
PICTURE_CHANGED: Final[Mapping[str, Any]] = {**PICTURE, "strength": 0.99}
PICTURE_PAINTED: Final[Mapping[str, Any]] = {**PICTURE, "mask_image": holes}
CONTROLLED: Final[Mapping[str, Any]] = {"control_image": small_picture}
#: Arguments that a call leaves out which takes its size from a picture.
SIZES: Final = ("height", "width")


def variant(
    case: Whole,
    pipeline: str,
    *,
    drop: tuple[str, ...] = (),
    call: Mapping[str, Any] | None = None,
    parts: Mapping[str, Any] | None = None,
    **own: Any,
) -> Whole:
    """A case like `case`, of another class.

    Args:
        case: of the family's first class.
        pipeline: the other class.
        drop: arguments its call does not have.
        call: arguments it has besides.
        parts: parts it has besides.
        own: what else is its own.
    """
    kept = {name: value for name, value in case.call.items() if name not in drop}
    return replace(
        case,
        pipeline=pipeline,
        call={**kept, **(call or {})},
        parts={**case.parts, **(parts or {})},
        **own,
    )
