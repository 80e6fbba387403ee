"""Draws the figures of `latentq bench`: a bar for the time and one for the memory of each decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

_ROW_PX: Final = 22
_LABEL_PX: Final = 260
_BAR_PX: Final = 330
_MARGIN_PX: Final = 20
#: Colours that stay apart for colour-blind readers (Okabe and Ito).
_COLOURS: Final = {
    "plain": "#999999",
    "fast": "#CC79A7",
    "compiled": "#D55E00",
    "low_memory": "#0072B2",
    "lean": "#009E73",
    "tiled": "#E69F00",
}


def draw(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """A picture of the rows `worker.bench` measured; those that failed are left out.

    Bars of one VAE, size and dtype are scaled to the longest among them, so that the modes can be compared.
    """
    good = [row for row in rows if "error" not in row]
    height = 2 * _MARGIN_PX + _ROW_PX * (len(good) + 1)
    width = 2 * _MARGIN_PX + _LABEL_PX + 2 * (_BAR_PX + _MARGIN_PX)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default()
    columns = (_MARGIN_PX + _LABEL_PX, _MARGIN_PX * 2 + _LABEL_PX + _BAR_PX)
    for left, title in zip(columns, ("seconds", "memory above weights, MiB"), strict=True):
        pen.text((left, _MARGIN_PX), title, fill="black", font=font)
    for number, row in enumerate(good, start=1):
        top = _MARGIN_PX + number * _ROW_PX
        same = [other for other in good if all(other[key] == row[key] for key in ("vae", "side", "frames", "dtype"))]
        size = f"{row['side']}" if row["frames"] == 1 else f"{row['side']}x{row['frames']}"
        pen.text((_MARGIN_PX, top), f"{row['vae']} {size} {row['dtype']} {row['mode']}", fill="black", font=font)
        texts = (f"{row['seconds']:.3f}", f"{row['peak_bytes'] / 2**20:.0f}")
        for left, key, text in zip(columns, ("seconds", "peak_bytes"), texts, strict=True):
            longest = max(other[key] for other in same) or 1
            length = int((_BAR_PX - 60) * row[key] / longest)
            pen.rectangle((left, top, left + length, top + _ROW_PX - 8), fill=_COLOURS[row["mode"]])
            pen.text((left + length + 5, top), text, fill="black", font=font)
    return picture
