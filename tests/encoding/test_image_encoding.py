"""Images: pixels and metadata survive, bytes are reproducible, and what a format cannot hold is refused.

Expected values come from Pillow's reader, from literal bytes of the PNG, EXIF and JPEG specifications, or
from the small PNG reader below.
"""

from __future__ import annotations

import io
import json
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from broker_config.errors import EncodeFailed
from worker.image_encoding import Encoded, encode_image, read_metadata

Pixels = npt.NDArray[np.uint8]

OUTPUTS = ("png", "jpg", "webp")
METADATA = {
    "prompt": "ein Kätzchen, naïve café ½",  # latin-1
    "negative_prompt": "低品質, размыто 😀\nsecond line",
    "seed": "42",
    "Clé": 'quotes " and \\ and {braces}',
    "empty": "",
}
PROVENANCE: dict[str, object] = {
    "job_id": "0198-a",
    "vae": "flux",
    "tiled": False,
    "sha256": "ab" * 32,
    "n": 3,
}

any_pixels = st.tuples(st.integers(1, 24), st.integers(1, 24), st.sampled_from((1, 3, 4))).flatmap(
    lambda shape: arrays(np.uint8, shape)
)
latin1_keys = st.text(st.characters(min_codepoint=1, max_codepoint=255), min_size=1, max_size=79).filter(
    lambda key: key != "latentq"
)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def smooth_picture(*, height: int = 96, width: int = 128) -> Pixels:
    """Slow gradients over all of the colour cube, as (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 23 + y / 41), np.sin(x / 31 - y / 17), np.cos(y / 29)]
    return np.stack([127.5 + 127.5 * wave for wave in waves], axis=-1).round().astype(np.uint8)


def encode(pixels: Pixels, output: str, **overrides: Any) -> Encoded:
    return encode_image(pixels, output=output, **{"metadata": {}, "provenance": None, **overrides})


def read_back(encoded: Encoded) -> Pixels:
    with Image.open(io.BytesIO(encoded.data)) as image:
        return np.asarray(image)


def psnr_db(a: Pixels, b: Pixels) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Type and body of each chunk; checks signature and checksums (PNG specification, 5.2 and 5.3)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size) == (zlib.crc32(kind + body),)
        chunks.append((kind, body))
        at += 12 + size
    return chunks


def png_pixels(data: bytes) -> Pixels:
    """Decode an 8-bit PNG without Pillow (PNG specification, chapter 9: filtering)."""
    chunks = png_chunks(data)
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert (chunks[0][0], depth, rest) == (b"IHDR", 8, [0, 0, 0])
    channels = {0: 1, 2: 3, 6: 4}[colour]
    raw = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    stride = width * channels
    above, rows = [0] * stride, []
    for y in range(height):
        kind, *line = raw[y * (stride + 1) : (y + 1) * (stride + 1)]
        for i in range(stride):
            left, corner = (line[i - channels], above[i - channels]) if i >= channels else (0, 0)
            up = above[i]
            estimate = left + up - corner
            paeth = min((left, up, corner), key=lambda near, to=estimate: abs(to - near))  # type: ignore[misc]
            line[i] = (line[i] + (0, left, up, (left + up) // 2, paeth)[kind]) % 256
        rows.append(line)
        above = line
    return np.array(rows, np.uint8).reshape(height, width, channels)


@given(any_pixels)
def test_png_gives_back_every_pixel(pixels: Pixels) -> None:
    read = read_back(encode(pixels, "png"))
    np.testing.assert_array_equal(read.reshape(pixels.shape), pixels)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_lossless_for_a_reader_that_is_not_pillow(channels: int) -> None:
    alpha = np.random.default_rng(0).integers(0, 256, (20, 31, 1), np.uint8)
    pixels = np.concatenate([smooth_picture(height=20, width=31), alpha], axis=-1)[:, :, :channels]
    np.testing.assert_array_equal(png_pixels(encode(pixels, "png").data), pixels)


def test_png_takes_any_strides() -> None:
    flipped = smooth_picture()[::-1, ::2, ::-1]
    assert not flipped.flags.c_contiguous
    np.testing.assert_array_equal(read_back(encode(flipped, "png")), flipped)


def test_png_uses_the_fast_setting_of_zlib() -> None:
    # Each row repeats 16 random pixels: zlib's search would find that, matching of runs (Z_RLE) finds nothing.
    pixels = np.tile(np.random.default_rng(0).integers(0, 256, (64, 16, 3), np.uint8), (1, 20, 1))
    body = next(body for kind, body in png_chunks(encode(pixels, "png").data) if kind == b"IDAT")
    assert body[:2] == b"\x78\x01"  # RFC 1950: FLEVEL 0, "compressor used fastest algorithm"
    assert len(body) > 0.9 * pixels.nbytes > 9 * len(zlib.compress(pixels.tobytes(), 1))


@pytest.mark.parametrize(("output", "least_db"), [("jpg", 42), ("webp", 38)])
def test_lossy_formats_stay_close_to_the_picture(output: str, least_db: float) -> None:
    pixels = smooth_picture()
    assert psnr_db(read_back(encode(pixels, output)), pixels) >= least_db


def test_jpg_keeps_full_chroma_at_quality_95() -> None:
    data = encode(smooth_picture(), "jpg").data
    start = data.index(b"\xff\xc0")  # SOF0: length, precision, height, width, components, then 3 bytes each
    assert struct.unpack_from(">HBHHB", data, start + 2) == (17, 8, 96, 128, 3)
    assert [data[start + 11 + 3 * i] for i in range(3)] == [0x11, 0x11, 0x11]
    with Image.open(io.BytesIO(data)) as image:
        # libjpeg scales the standard's first entry, 16, by 200 - 2 * 95 = 10 %, rounded.
        assert image.quantization[0][0] == (16 * 10 + 50) // 100  # type: ignore[attr-defined]


def test_jpg_goes_through_a_real_file_so_that_the_gil_is_released(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    descriptors: list[int] = []
    save = Image.Image.save

    def recording_save(self: Image.Image, fp: Any, **options: Any) -> None:
        descriptors.append(fp.fileno())  # io.UnsupportedOperation for a BytesIO
        save(self, fp, **options)

    monkeypatch.setattr(Image.Image, "save", recording_save)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    encode(smooth_picture(), "jpg")
    assert len(descriptors) == 1
    assert list(tmp_path.iterdir()) == []


def test_jpg_that_a_full_disk_cut_short_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "save", lambda self, fp, **options: fp.write(b"\xff\xd8\xff\xe0 half"))
    with pytest.raises(EncodeFailed, match="disk full"):
        encode(smooth_picture(), "jpg")


def test_jpg_refuses_transparency_and_says_what_to_use() -> None:
    with pytest.raises(EncodeFailed, match="use png or webp") as caught:
        encode(np.zeros((4, 4, 4), np.uint8), "jpg")
    assert caught.value.field == "output"


def test_webp_is_lossy_and_keeps_transparency() -> None:
    pixels = smooth_picture()
    assert encode(pixels, "webp").data[:16:8] == b"RW"
    assert encode(pixels, "webp").data[8:16] == b"WEBPVP8 "  # VP8L would be the lossless kind
    alpha = np.tile(np.arange(128, dtype=np.uint8), (96, 1))[:, :, None]
    read = read_back(encode(np.concatenate([pixels, alpha], axis=-1), "webp"))
    np.testing.assert_array_equal(read[:, :, 3:], alpha)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (33, 1)])
def test_thin_grey_pictures_encode(output: str, shape: tuple[int, int]) -> None:
    read = read_back(encode(np.full((*shape, 1), 200, np.uint8), output))
    assert read.shape[:2] == shape
    assert abs(int(read.flat[0]) - 200) <= 2


@pytest.mark.parametrize(
    ("output", "content_type"), [("png", "image/png"), ("jpg", "image/jpeg"), ("webp", "image/webp")]
)
def test_the_result_names_its_type(output: str, content_type: str) -> None:
    encoded = encode(smooth_picture(), output)
    assert (encoded.content_type, encoded.extension) == (content_type, output)
    with Image.open(io.BytesIO(encoded.data)) as image:
        assert image.get_format_mimetype() == content_type


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("metadata", [{}, METADATA])
@pytest.mark.parametrize("provenance", [None, {}, PROVENANCE])
def test_metadata_and_provenance_come_back(
    output: str, metadata: dict[str, str], provenance: dict[str, object] | None
) -> None:
    encoded = encode(smooth_picture(), output, metadata=metadata, provenance=provenance)
    assert read_metadata(encoded.data) == (metadata, provenance)


@pytest.mark.parametrize("output", OUTPUTS)
@given(metadata=st.dictionaries(latin1_keys, any_text, max_size=4))
def test_any_text_comes_back(output: str, metadata: dict[str, str]) -> None:
    encoded = encode(np.zeros((1, 1, 3), np.uint8), output, metadata=metadata)
    assert read_metadata(encoded.data) == (metadata, None)


@pytest.mark.parametrize("output", OUTPUTS)
def test_metadata_does_not_touch_the_pixels(output: str) -> None:
    bare = encode(smooth_picture(), output)
    told = encode(smooth_picture(), output, metadata=METADATA, provenance=PROVENANCE)
    np.testing.assert_array_equal(read_back(bare), read_back(told))


def test_png_text_is_what_other_programs_expect() -> None:
    metadata = {"parameters": "Schrödinger", "prompt": "猫"}
    data = encode(smooth_picture(), "png", metadata=metadata, provenance={"b": 1, "a": "x"}).data
    text = [chunk for chunk in png_chunks(data) if chunk[0] in (b"tEXt", b"iTXt", b"zTXt")]
    assert text == [
        (b"tEXt", b"parameters\0Schr\xf6dinger"),
        # Keyword, compression flag and method, language, translated keyword, text in UTF-8.
        (b"iTXt", b"prompt\0" + b"\0\0" + b"\0" + b"\0" + b"\xe7\x8c\xab"),
        (b"tEXt", b'latentq\0{"a":"x","b":1}'),
    ]
    with Image.open(io.BytesIO(data)) as image:
        assert image.info == {**metadata, "latentq": '{"a":"x","b":1}'}


@pytest.mark.parametrize("output", ["jpg", "webp"])
def test_exif_user_comment_is_what_other_programs_expect(output: str) -> None:
    encoded = encode(smooth_picture(), output, metadata={"prompt": "猫"}, provenance={"vae": "wan"})
    with Image.open(io.BytesIO(encoded.data)) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    document = json.loads(comment[8:].decode("utf-16-be"))
    assert document == {"metadata": {"prompt": "猫"}, "latentq": {"vae": "wan"}}
    # An IFD entry: tag, type 7 (undefined), in the byte order of the comment.
    assert struct.pack(">HHI", 0x9286, 7, len(comment)) in encoded.data


@pytest.mark.parametrize("output", OUTPUTS)
def test_nothing_to_say_writes_nothing(output: str) -> None:
    data = encode(smooth_picture(), output).data
    assert not any(mark in data for mark in (b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"Exif", b"EXIF", b"XMP"))


@pytest.mark.parametrize("output", OUTPUTS)
def test_equal_input_gives_equal_bytes(output: str) -> None:
    pixels = smooth_picture()
    assert encode(pixels, output) == encode(pixels.copy(), output)
    backwards = dict(reversed(METADATA.items()))
    told = encode(pixels, output, metadata=METADATA, provenance=PROVENANCE)
    again = encode(pixels, output, metadata=backwards, provenance=dict(reversed(PROVENANCE.items())))
    assert told == again


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("key", ["", "k" * 80, "ключ", "a\0b", "latentq"])
def test_bad_metadata_key_is_refused_by_every_format(output: str, key: str) -> None:
    with pytest.raises(EncodeFailed, match="metadata key") as caught:
        encode(smooth_picture(), output, metadata={key: "x"})
    assert caught.value.field == "metadata"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(
    "overrides",
    [
        {"metadata": {"k": "\ud800"}},
        {"metadata": {"k": 5}},
        {"provenance": {"loss": float("nan")}},
        {"provenance": {"k": "\ud800"}},
        {"provenance": {"k": object()}},
    ],
    ids=["surrogate", "not text", "nan", "surrogate in provenance", "not JSON"],
)
def test_unwritable_metadata_is_refused_by_every_format(output: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(EncodeFailed) as caught:
        encode(smooth_picture(), output, **overrides)
    assert caught.value.field == "metadata"


@pytest.mark.parametrize(
    ("pixels", "output", "overrides"),
    [
        (np.zeros((1, 65_501, 3), np.uint8), "jpg", {}),
        (np.zeros((1, 16_384, 3), np.uint8), "webp", {}),
        (np.zeros((4, 4, 3), np.uint8), "jpg", {"metadata": {"prompt": "x" * 40_000}}),
    ],
    ids=["too wide for jpg", "too wide for webp", "metadata too long for jpg"],
)
def test_beyond_a_format_the_error_names_the_one_that_holds_it(
    pixels: Pixels, output: str, overrides: dict[str, Any]
) -> None:
    with pytest.raises(EncodeFailed, match="use png"):
        encode(pixels, output, **overrides)
    assert encode(pixels, "png", **overrides).data


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ],
    ids=lambda pixels: f"{pixels.dtype}{pixels.shape}",
)
def test_what_is_not_uint8_hwc_is_refused(pixels: Any) -> None:
    with pytest.raises(EncodeFailed, match="an image is uint8"):
        encode(pixels, "png")


def test_unknown_output_is_refused_with_the_list() -> None:
    with pytest.raises(EncodeFailed, match="png, jpg, webp") as caught:
        encode(smooth_picture(), "gif")
    assert caught.value.field == "output"


def test_pictures_of_other_programs_read_as_having_no_provenance() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a cat\nSteps: 20".encode("utf-16-be")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG", exif=exif)
    assert read_metadata(buffer.getvalue()) == ({}, None)

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="WEBP")
    assert read_metadata(buffer.getvalue()) == ({}, None)


@pytest.mark.parametrize("data", [b"", b"not a picture", b"GIF89a" + bytes(20)])
def test_reading_what_is_no_picture_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a PNG, JPEG or WebP"):
        read_metadata(data)
