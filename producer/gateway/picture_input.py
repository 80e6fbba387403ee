"""Pictures out of a body: what they are is sniffed, their size is known before a pixel is decoded.

Slow for large pictures: call it in a thread, but for `kind_of`.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
from collections.abc import Iterator
from typing import Final

import numpy as np
from PIL import Image

from broker_config.errors import (
    BadRequest,
    InvalidDtype,
    InvalidOption,
    LatentqError,
    MediaTypeUnsupported,
    PixelLimitExceeded,
)
from producer.pixel_input import NAME
from producer.tensor_input import TensorFile

#: Each is a pass over the whole picture: a hundred take 5 s for 64 megapixels, and encoders make 10 to 20.
MOST_SCANS: Final = 100
#: In what is compressed, an 0xFF that begins no marker has 0x00 or a restart behind it (ITU-T T.81, B.1.1).
_MARKER: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_START_OF_SCAN: Final = 0xDA
_END: Final = 0xD9
#: Markers without a segment: the start of the picture, and one for temporary use.
_ALONE: Final = frozenset({0xD8, 0x01})
#: Looked through in some milliseconds, during which no other thread runs.
_PIECE_BYTES: Final = 1 << 20
#: Rows brought to RGB at a time, so that there is no second and third copy of the picture.
_STRIP_ROWS: Final = 64
#: What Pillow has in memory for a pixel while it decodes, and the 3 bytes that come of it, as measured with 16
#: megapixels: a PNG is 4 bytes in Pillow (7.2 in all); the coefficients of a progressive JPEG are up to 8 (12.0 with
#: CMYK); libwebp keeps two canvases, and Pillow two copies (17.3).
_BYTES_PER_PX: Final = {"PNG": 8, "JPEG": 12, "WEBP": 18}


def kind_of(head: bytes | bytearray) -> str:
    """PNG, JPEG or WEBP, by the first 16 bytes.

    Raises:
        MediaTypeUnsupported: something else.
    """
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    raise MediaTypeUnsupported(
        "the body is neither PNG, JPEG nor WebP: send one of these, or a tensor's bytes with `shape` and `dtype` in "
        "the query"
    )


def peek_picture(data: bytes, *, kind: str) -> TensorFile:
    """The picture as far as its header tells: uint8 (1, H, W, 3) without elements.

    Raises:
        BadRequest: it cannot be read.
        PixelLimitExceeded: so large that Pillow takes it for an attack.
        InvalidOption, InvalidDtype: several frames, too many scans, or more than 8 bits.
    """
    if kind == "JPEG":
        _check_scans(data)
    with _opened(data, kind=kind) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise InvalidOption("the picture is animated: send one frame, or the clip as a tensor", field=NAME)
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
            raise InvalidDtype(
                f"the picture has pixels of kind {image.mode}: convert it to 8 bits, or send it as a tensor", field=NAME
            )
        shape = (1, image.height, image.width, 3)
    return TensorFile(dtype="uint8", shape=shape, raw=lambda: memoryview(b""), name=NAME)


def read_picture(data: bytes, *, kind: str) -> TensorFile:
    """The picture, uint8 (1, H, W, 3). Transparency is left out.

    Raises:
        BadRequest: it cannot be decoded.
    """
    with _opened(data, kind=kind) as image:
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for top in range(0, image.height, _STRIP_ROWS):
            strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height)))
            pixels[top : top + strip.height] = np.asarray(strip.convert("RGB"))
    return TensorFile(dtype="uint8", shape=(1, *pixels.shape), raw=lambda: pixels.reshape(-1).data, name=NAME)


def bytes_to_read(picture: TensorFile, *, kind: str) -> int:
    """What `read_picture` takes in memory for a picture that was peeked at, besides the file."""
    return math.prod(picture.shape[:-1]) * _BYTES_PER_PX[kind]


def _check_scans(data: bytes) -> None:
    """Counts scans of the picture itself: not of a thumbnail in its metadata, nor what a phone put behind its end."""
    scans = at = 0
    while at < len(data):
        marker = _MARKER.search(data, at, at + _PIECE_BYTES)
        if marker is None:
            at += _PIECE_BYTES - 1  # a marker may lie across
            continue
        kind, at = data[marker.end() - 1], marker.end()
        if kind == _END:
            return
        if kind in _ALONE:
            continue
        scans += kind == _START_OF_SCAN
        at += max(2, int.from_bytes(data[at : at + 2]))  # its segment, whose length counts itself
        if scans > MOST_SCANS:
            raise InvalidOption(
                f"the JPEG has more than {MOST_SCANS} scans, each a pass over the whole picture: save it anew, with "
                "the usual number of them or without progression",
                field=NAME,
            )


@contextlib.contextmanager
def _opened(data: bytes, *, kind: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            yield image
    except LatentqError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PixelLimitExceeded(
            "the picture has far more pixels than are taken (LATENTQ_MAX_IMAGE_PX): resize it", field=NAME
        ) from None
    # What Pillow's readers raise of damaged files (PIL/ImageFile.py `ImageFile.__init__`, PIL/PngImagePlugin.py).
    except (OSError, SyntaxError, ValueError, IndexError, TypeError, KeyError, EOFError, OverflowError, struct.error):
        raise BadRequest(f"the {kind} cannot be read: it is damaged, or its end is missing") from None
