"""Latents of a picture and of a clip for the tiny VAEs, and what the pictures say of their job."""

from __future__ import annotations

import io
import json
from typing import Any

import torch
from PIL import Image

METADATA = {"prompt": "ein Kätzchen, 低品質", "seed": "42"}


def picture_latents(batch: int = 1, *, seed: int = 0) -> torch.Tensor:
    """Of `sd`: pictures of 96 × 64 px."""
    return torch.randn(batch, 4, 8, 12, generator=torch.Generator().manual_seed(seed))


def clip_latents(batch: int = 1, *, seed: int = 0) -> torch.Tensor:
    """Of `hunyuanvideo`: clips of 9 frames of 48 × 32 px."""
    return torch.randn(batch, 16, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def user_comment(data: bytes) -> dict[str, Any]:
    """The JSON in a picture's EXIF UserComment (EXIF 2.32, 4.6.5: tag 0x9286 of the IFD 0x8769, 8 bytes of charset)."""
    with Image.open(io.BytesIO(data)) as picture:
        comment = picture.getexif().get_ifd(0x8769).get(0x9286, b"")
    return dict(json.loads(comment[8:].decode("utf-16-be") or "{}"))
