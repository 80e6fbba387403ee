"""One decoded picture to the bytes of a PNG, JPEG or WebP file, and the metadata inside such a file.

Owns how each image format is written (its settings and their reasons) and where metadata lives in it:

======  ==================================================  ==================================
format  the caller's metadata                               our own provenance
======  ==================================================  ==================================
PNG     one text chunk a key (tEXt, iTXt beyond latin-1)    text chunk `latentq`, JSON
JPEG    EXIF UserComment: {"metadata": …, "latentq": …}     in the same object
WebP    as in JPEG
======  ==================================================  ==================================

Nothing is written when there is nothing to say, and nothing that depends on the clock: equal pixels and equal
metadata give equal bytes.

DESIGN. Functions without state, safe from any number of threads. Each format is encoded with the GIL
released, so that a pool of threads keeps up with the accelerator. For JPEG that takes a real file: into a
BytesIO, Pillow keeps the GIL.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from broker_config.errors import EncodeFailed

#: Level 1 with run-length matching: 74-95 ms for a photo-like 1024x1024 against 270-340 ms at zlib's default
#: level 6, and no larger (1592 kB against 1596 kB). Plain level 1 is no faster and up to 15 % larger.
PNG_COMPRESS_LEVEL = 1
PNG_COMPRESS_TYPE = 3  # zlib's Z_RLE
#: Artefacts do not show beside the PNG; 100 more than doubles the bytes (835 to 2086 kB, a grainy 1024x1024).
JPEG_QUALITY = 95
#: 4:4:4: halved chroma is what shows first in generated pictures (thin red lines, neon on black).
JPEG_SUBSAMPLING = 0
#: Lossy on purpose (lossless is what PNG is for): 164 kB for the picture that takes 1592 kB as PNG.
WEBP_QUALITY = 90
#: libwebp's own default; method 6 takes 3.6 times as long for less than 1 % of the bytes.
WEBP_METHOD = 4

#: PNG keyword and JSON key of our own provenance; a caller's metadata may not use it.
PROVENANCE_KEY = "latentq"
#: Limit of the PNG specification for a keyword.
KEY_MAX_BYTES = 79
#: What EXIF puts before a UserComment in UTF-16, whose byte order is that of the block.
USER_COMMENT_UNICODE = b"UNICODE\x00"
#: Every complete JPEG ends with this marker.
JPEG_END_OF_IMAGE = b"\xff\xd9"

#: What stops an encoder, for the message that says what to do.
_LIMITS = {
    "png": "a png holds 2147483647 px a side",
    "jpg": "a jpg holds 65500 px a side and 65533 bytes of metadata; use png",
    "webp": "a webp holds 16383 px a side; use png",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One encoded image or video."""

    #: The whole file.
    data: bytes
    #: Its media type, such as `image/png`.
    content_type: str
    #: Its customary file name extension, without the dot.
    extension: str


def encode_image(
    pixels: npt.NDArray[np.uint8],
    *,
    output: str,
    metadata: Mapping[str, str],
    provenance: Mapping[str, object] | None,
) -> Encoded:
    """Encode `pixels`, uint8 (height, width, channels) with 1 (grey), 3 (RGB) or 4 (RGBA) channels.

    `output` is `png`, `jpg` or `webp`. `metadata` and `provenance` are written as the module says. Raises
    EncodeFailed, which names the field at fault, for anything the format cannot hold.
    """
    if output not in _FORMATS:
        raise EncodeFailed(f"output {output!r} is no image; use one of {', '.join(_FORMATS)}", field="output")
    _check_pixels(pixels, output=output)
    document = metadata_document(metadata, provenance)
    save, content_type = _FORMATS[output]
    height_px, width_px, channels = pixels.shape
    try:
        image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        data = save(image, document)
    except (OSError, ValueError, MemoryError) as error:
        raise EncodeFailed(
            f"could not encode {width_px}x{height_px} pixels as {output}: {error} ({_LIMITS[output]})"
        ) from error
    return Encoded(data=data, content_type=content_type, extension=output)


def read_metadata(data: bytes) -> tuple[dict[str, str], dict[str, object] | None]:
    """The caller's metadata and our provenance (None where there is none), as `encode_image` wrote them.

    From a PNG of another program come its text chunks; from its JPEG or WebP, nothing. Raises ValueError if
    `data` is none of the three formats.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                metadata = {key: str(value) for key, value in image.text.items()}
                provenance = _parse_object(metadata.pop(PROVENANCE_KEY, ""))
                return metadata, provenance
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    except UnidentifiedImageError as error:
        raise ValueError("the data is not a PNG, JPEG or WebP file") from error
    document = _parse_user_comment(comment)
    found, own = document.get("metadata"), document.get(PROVENANCE_KEY)
    metadata = {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}
    return metadata, own if isinstance(own, dict) else None


def metadata_document(metadata: Mapping[str, str], provenance: Mapping[str, object] | None) -> dict[str, object]:
    """`{"metadata": …, "latentq": …}`: what a file says about itself; empty when there is nothing to write.

    The same rules hold for every format, so that a latent which is decoded again into another one does not
    fail on its keys.
    """
    for key, value in metadata.items():
        _check_entry(key, value)
    document: dict[str, object] = {}
    if metadata or provenance is not None:
        document["metadata"] = dict(metadata)
    if provenance is not None:
        document[PROVENANCE_KEY] = dict(provenance)
    return document


def canonical_json(document: Mapping[str, object]) -> str:
    """The one JSON text of `document`: sorted keys, no spaces, no NaN, characters as themselves."""
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode()  # A lone surrogate passes json.dumps, and no format can hold it.
    except (TypeError, ValueError) as error:
        raise EncodeFailed(f"metadata cannot be written as JSON: {error}", field="metadata") from error
    return text


def _check_pixels(pixels: npt.NDArray[np.uint8], *, output: str) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise EncodeFailed(
            f"pixels are {pixels.dtype} {pixels.shape}; an image is uint8 (height, width, 1, 3 or 4 channels)"
        )
    if output == "jpg" and pixels.shape[2] == 4:
        # Composing onto white here would be a choice that the caller never made.
        raise EncodeFailed("output jpg holds no transparency; use png or webp", field="output")


def _check_entry(key: str, value: str) -> None:
    try:
        size_bytes = len(key.encode("latin-1"))
    except UnicodeEncodeError:
        size_bytes = 0
    if not 1 <= size_bytes <= KEY_MAX_BYTES or "\x00" in key:
        raise EncodeFailed(f"metadata key {key!r} is not 1-{KEY_MAX_BYTES} latin-1 characters", field="metadata")
    if key == PROVENANCE_KEY:
        raise EncodeFailed(f"metadata key {key!r} is reserved; use another name", field="metadata")
    if not isinstance(value, str):
        raise EncodeFailed(f"metadata {key!r} is {type(value).__name__}; values are str", field="metadata")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise EncodeFailed(f"metadata {key!r} is no text that UTF-8 can hold: {error}", field="metadata") from error


def _save_png(image: Image.Image, document: Mapping[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(
        buffer,
        format="PNG",
        compress_level=PNG_COMPRESS_LEVEL,
        compress_type=PNG_COMPRESS_TYPE,
        pnginfo=_png_text(document),
    )
    return buffer.getvalue()


def _png_text(document: Mapping[str, object]) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    metadata, provenance = document.get("metadata"), document.get(PROVENANCE_KEY)
    if isinstance(metadata, dict):
        for key in sorted(metadata):
            # Writes tEXt, and turns to iTXt by itself for a value beyond latin-1.
            text.add_text(key, metadata[key])
    if isinstance(provenance, dict):
        text.add_text(PROVENANCE_KEY, canonical_json(provenance))
    return text


def _save_jpeg(image: Image.Image, document: Mapping[str, object]) -> bytes:
    # A file with a descriptor and no name: Pillow writes to it in C, without the GIL; nothing stays behind.
    with tempfile.TemporaryFile(prefix="latentq-jpeg-") as file:
        image.save(
            file,
            format="JPEG",
            quality=JPEG_QUALITY,
            subsampling=JPEG_SUBSAMPLING,
            exif=_user_comment(document),
        )
        file.seek(0)
        data = file.read()
    if not data.endswith(JPEG_END_OF_IMAGE):
        # Pillow's encode_to_file takes a short write() for a whole one, so a full disk would pass in silence.
        raise OSError("the temporary file was cut short; is the disk full?")
    return data


def _save_webp(image: Image.Image, document: Mapping[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=WEBP_QUALITY, method=WEBP_METHOD, exif=_user_comment(document))
    return buffer.getvalue()


_FORMATS: dict[str, tuple[Callable[[Image.Image, Mapping[str, object]], bytes], str]] = {
    "png": (_save_png, "image/png"),
    "jpg": (_save_jpeg, "image/jpeg"),
    "webp": (_save_webp, "image/webp"),
}


def _user_comment(document: Mapping[str, object]) -> bytes:
    """An EXIF block with `document` as its UserComment; empty (then no block is written) without one.

    Laid out here (TIFF 6.0, section 2; EXIF 2.32, 4.6.5), since Pillow's `Exif` gives the comment type 1,
    BYTE, where EXIF requires 7, UNDEFINED.
    """
    if not document:
        return b""
    comment = USER_COMMENT_UNICODE + canonical_json(document).encode("utf-16-be")
    # A directory is a count, entries of (tag, type, count, value or place), and the place of the next one;
    # places count from "MM".
    first = struct.pack(">H HHII I", 1, ExifTags.IFD.Exif, 4, 1, 26, 0)
    second = struct.pack(">H HHII I", 1, ExifTags.Base.UserComment, 7, len(comment), 44, 0)
    return b"Exif\x00\x00" + b"MM\x00*" + struct.pack(">I", 8) + first + second + comment


def _parse_user_comment(comment: object) -> dict[str, object]:
    if not isinstance(comment, bytes) or not comment.startswith(USER_COMMENT_UNICODE):
        return {}
    text = comment[len(USER_COMMENT_UNICODE) :].decode("utf-16-be", errors="replace")
    return _parse_object(text) or {}


def _parse_object(text: str) -> dict[str, object] | None:
    """The JSON object in `text`; None if it is anything else (another program's comment)."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None
