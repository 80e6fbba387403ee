"""The photographs that demo VAE and demo pipeline know by heart.

All of them are colour files inside the scikit-image wheel (``skimage.data``); origin
and licence are as stated in skimage's own docstrings:

* ``astronaut``: Eileen Collins, NASA Great Images database (flic.kr/p/r9qvLn). "No known copyright
  restrictions, released into the public domain."
* ``coffee``: a coffee cup, courtesy of Pikolo Espresso Bar. "No copyright restrictions. CC0 by the
  photographer (Rachel Michetti)."
* ``chelsea``: Chelsea the cat. "No copyright restrictions. CC0 by the photographer (Stefan van der
  Walt)."
* ``rocket``: launch of DSCOVR on a Falcon 9, SpaceX Photos (flickr 16511594820). "Captured by
  SpaceX and released in the public domain."
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import skimage.data
import torch

Box = tuple[int, int, int, int]  # y, x, height, width in the source photograph


@dataclass(frozen=True)
class Photo:
    """A photograph of skimage.data and the part of it that is stored as latents."""

    name: str
    title: str
    licence: str
    box: Box


@dataclass(frozen=True)
class Clip:
    """A linear pan of a window over one photograph."""

    source: str
    title: str
    height: int
    width: int
    frames: int
    fps: int
    pan: tuple[int, int, int, int]  # y0, x0, y1, x1: top left corner, first and last frame


PHOTOS = (
    Photo("astronaut", "Eileen Collins, astronaut (NASA)", "public domain (NASA)", (0, 0, 512, 512)),
    Photo("coffee", "A cup of coffee (Rachel Michetti)", "CC0", (0, 0, 400, 600)),
    Photo("chelsea", "Chelsea the cat (Stefan van der Walt)", "CC0", (2, 1, 296, 448)),
    Photo("rocket", "Falcon 9 lifts off with DSCOVR (SpaceX)", "public domain (SpaceX)", (3, 64, 424, 512)),
)
CLIP = Clip("coffee", "A pan over a cup of coffee", 240, 304, 20, 12, (150, 0, 40, 296))


def load_photo(name: str) -> torch.Tensor:
    """Return a photograph as (3, H, W) float32 in [-1, 1]."""
    pixels = np.array(getattr(skimage.data, name)())[..., :3]
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0


def cut(image: torch.Tensor, box: Box) -> torch.Tensor:
    """Crop (C, H, W) to the box and add a batch axis."""
    y, x, height, width = box
    return image[:, y : y + height, x : x + width].unsqueeze(0)


def clip_boxes(clip: Clip) -> list[Box]:
    """Return the box of every frame, by the formula in train_demo_vae.py."""
    y0, x0, y1, x1 = clip.pan
    boxes: list[Box] = []
    for index in range(clip.frames):
        t = index / (clip.frames - 1)
        y = math.floor(y0 + (y1 - y0) * t + 0.5)
        x = math.floor(x0 + (x1 - x0) * t + 0.5)
        boxes.append((y, x, clip.height, clip.width))
    return boxes
