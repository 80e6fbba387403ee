"""The photographs that the demo pipeline draws, and how like one a picture is."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from PIL import Image

#: dB. The demo VAE's own bounds for these squares are 23.0, 26.2, 28.9 and 28.9.
NEEDED_PSNR: Final = {"astronaut": 22.0, "coffee": 25.0, "chelsea": 27.0, "rocket": 27.5}
#: The middle of the part of each photograph that the demo VAE knows: (y, x, side).
_SQUARES: Final = {"astronaut": (0, 0, 512), "coffee": (0, 100, 400), "chelsea": (2, 77, 296), "rocket": (3, 108, 424)}


def photograph(name: str) -> np.ndarray[Any, Any]:
    """The middle square, 256 × 256 × 3, resized by PIL and not as the script that trains does it."""
    import skimage.data

    y, x, side = _SQUARES[name]
    pixels = np.asarray(getattr(skimage.data, name)())[y : y + side, x : x + side, :3]
    return np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)).astype(np.float64)


def psnr(shown: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """dB between two pictures of 8 bits."""
    return float(10 * np.log10(255**2 / np.mean((shown.astype(np.float64) - wanted) ** 2)))
