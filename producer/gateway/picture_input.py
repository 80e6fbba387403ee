"""Pictures out of a body: what they are is sniffed, their size is known before a pixel is decoded.

Slow for large pictures: call it in a thread, but for `kind_of`.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator

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
        InvalidOption, InvalidDtype: several frames, or more than 8 bits.
    """
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
        pixels = np.ascontiguousarray(image.convert("RGB"))
    return TensorFile(dtype="uint8", shape=(1, *pixels.shape), raw=lambda: pixels.reshape(-1).data, name=NAME)


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
