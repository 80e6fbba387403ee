"""Video: every frame arrives in its colours and its size, and nothing of ffmpeg outlives the encoder.

Expected values come from the frames that went in, from BT.709 arithmetic, and from the boxes of the MP4
(ISO/IEC 14496-12) read with struct.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import numpy.typing as npt
import pytest

from broker_config.errors import EncodeFailed
from worker import video_encoding
from worker.image_encoding import Encoded
from worker.video_encoding import VideoEncoder, VideoInfo, decode_video, encode_video, probe_video

Frames = npt.NDArray[np.uint8]

#: A pipe holds 64 KiB: one frame of this size does not fit.
LARGE = {"width": 320, "height": 240}


def moving_picture(*, frames: int, height: int = 96, width: int = 128) -> Frames:
    """Saturated colours in slow gradients that move 2 px a frame, as (frames, height, width, 3)."""
    y, x = np.mgrid[0:height, 0 : width + 2 * frames]
    waves = [np.sin(x / 23 + y / 41), np.sin(x / 31 - y / 27), np.cos(x / 43)]
    scene = np.stack([127.5 + 127.5 * wave for wave in waves], axis=-1).round().astype(np.uint8)
    return np.stack([scene[:, 2 * i : 2 * i + width] for i in range(frames)])


def encode(frames: Any, **overrides: Any) -> Encoded:
    return encode_video(frames, **{"fps": 16, "metadata": {}, "provenance": None, **overrides})


def encoder(**overrides: Any) -> VideoEncoder:
    return VideoEncoder(**{"fps": 16, "metadata": {}, "provenance": None, **LARGE, **overrides})


def large_frame(value: int = 0) -> Frames:
    return np.full((LARGE["height"], LARGE["width"], 3), value, np.uint8)


def psnr_db(a: Frames, b: Frames) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and body of each MP4 box in `data` (sizes of 32 bits)."""
    at = 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + size]
        at += size


def box(data: bytes, *path: bytes) -> bytes:
    for kind in path:
        data = dict(boxes(data))[kind]
    return data


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go during the test, and nowhere else."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every process that is started during the test."""
    imageio_ffmpeg.get_ffmpeg_exe()  # Starts one itself, the first time.
    processes: list[subprocess.Popen[bytes]] = []

    class RecordedPopen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", RecordedPopen)
    return processes


def use_fake_ffmpeg(script: str, *, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))


def assert_nothing_left(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    (process,) = started
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):  # A zombie would still take the signal.
        os.kill(process.pid, 0)
    assert list(folder.iterdir()) == []


# What is in the file ------------------------------------------------------------------------------------


def test_video_has_the_frames_size_rate_and_format_it_was_given() -> None:
    encoded = encode(moving_picture(frames=9), fps=24)
    assert (encoded.content_type, encoded.extension) == ("video/mp4", "mp4")
    assert probe_video(encoded.data) == VideoInfo(
        width=128, height=96, fps=24, frames=9, pixel_format="yuv420p", codec="h264", comment=None
    )


def test_decoded_frames_are_the_frames_that_went_in() -> None:
    frames = moving_picture(frames=12)
    decoded = decode_video(encode(frames).data)
    assert decoded.shape == frames.shape
    assert min(psnr_db(a, b) for a, b in zip(decoded, frames, strict=True)) >= 35


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (200, 30, 120)])
def test_colours_are_stored_as_bt709_in_limited_range(colour: tuple[int, int, int], tmp_path: Path) -> None:
    frames = np.broadcast_to(np.array(colour, np.uint8), (2, 32, 48, 3))
    path = tmp_path / "video.mp4"
    path.write_bytes(encode(frames).data)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path)]
    planes = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"], capture_output=True, check=True
    ).stdout
    stored = np.frombuffer(planes, np.uint8).reshape(2, 32 * 48 * 3 // 2).mean(axis=0)
    luma, blue, red = np.split(stored, [32 * 48, 32 * 48 * 5 // 4])
    # ITU-R BT.709, 3.2 to 3.5: Kr = 0.2126, Kb = 0.0722; 16-235 for luma, 16-240 for chroma.
    r, g, b = (value / 255 for value in colour)
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    assert luma.mean() == pytest.approx(16 + 219 * y, abs=1)
    assert blue.mean() == pytest.approx(128 + 224 * (b - y) / 1.8556, abs=1)
    assert red.mean() == pytest.approx(128 + 224 * (r - y) / 1.5748, abs=1)


def test_colours_are_tagged_as_bt709_in_limited_range() -> None:
    data = encode(moving_picture(frames=1)).data
    at = data.index(b"colrnclx") + 8
    # Primaries, transfer, matrix (all 1, BT.709), and the bit for full range.
    assert struct.unpack_from(">HHHB", data, at) == (1, 1, 1, 0)


@pytest.mark.parametrize("fps", [16.0, 23.976, 24000 / 1001, 29.97, 12.5, 1 / 3, 60])
def test_any_frame_rate_passes_through_exactly(fps: float) -> None:
    data = encode(moving_picture(frames=5, height=32, width=32), fps=fps).data
    assert probe_video(data).fps == fps
    # Version and flags, created, modified, timescale, duration.
    header = box(data, b"moov", b"trak", b"mdia", b"mdhd")
    _, _, _, timescale, duration = struct.unpack_from(">IIIII", header)
    assert duration / timescale == pytest.approx(5 / fps, rel=1e-9)


def test_a_single_frame_is_a_video() -> None:
    frames = moving_picture(frames=1)
    data = encode(frames, fps=8).data
    assert (probe_video(data).frames, probe_video(data).fps) == (1, 8)
    assert psnr_db(decode_video(data), frames) >= 35


def test_index_is_in_front_of_the_pictures() -> None:
    order = [kind for kind, _ in boxes(encode(moving_picture(frames=3)).data)]
    assert order.index(b"moov") < order.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(47, 83), (48, 83), (47, 84)])
def test_odd_sizes_are_padded_by_their_edge_and_never_rescaled(height: int, width: int) -> None:
    frames = moving_picture(frames=4, height=height, width=width)
    data = encode(frames).data
    info, decoded = probe_video(data), decode_video(data)
    assert (info.height, info.width) == (height + height % 2, width + width % 2) == decoded.shape[1:3]
    assert psnr_db(decoded[:, :height, :width], frames) >= 35
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert psnr_db(decoded[:, -1], padded[:, -1]) >= 30
    assert psnr_db(decoded[:, :, -1], padded[:, :, -1]) >= 30
    assert info.comment is not None
    assert json.loads(info.comment) == {"original_size": {"height": height, "width": width}}


@pytest.mark.parametrize("provenance", [None, {}, {"vae": "wan", "tiled": False}])
@pytest.mark.parametrize("metadata", [{}, {"prompt": 'naïve; a=b #1 \\ "猫" 😀\nline', "seed": "1"}])
def test_metadata_is_in_the_comment(metadata: dict[str, str], provenance: dict[str, object] | None) -> None:
    data = encode(moving_picture(frames=1), metadata=metadata, provenance=provenance).data
    comment = probe_video(data).comment
    if not metadata and provenance is None:
        assert comment is None
    else:
        assert json.loads(comment or "").get("metadata", {}) == metadata
        assert json.loads(comment or "").get("latentq") == provenance


def test_comment_is_stored_where_players_look() -> None:
    data = encode(moving_picture(frames=1), metadata={"p": "猫"}, provenance={"b": 1, "a": 2}).data
    text = '{"latentq":{"a":2,"b":1},"metadata":{"p":"猫"}}'.encode()
    # The item's box; inside, a data box of type 1 (UTF-8) and locale 0.
    expected = struct.pack(">I4sI4sII", 24 + len(text), b"\xa9cmt", 16 + len(text), b"data", 1, 0) + text
    assert expected in box(data, b"moov", b"udta")


def test_long_metadata_survives_and_stays_off_the_command_line(
    started: list[subprocess.Popen[bytes]],
) -> None:
    prompt = "secret-猫=;#\\ " * 20_000  # Linux takes arguments of up to 128 KiB.
    comment = probe_video(encode(moving_picture(frames=1), metadata={"p": prompt}).data).comment
    assert json.loads(comment or "") == {"metadata": {"p": prompt}}
    assert started
    assert not any("secret" in str(process.args) for process in started)


def test_equal_frames_give_equal_bytes_also_side_by_side() -> None:
    frames = moving_picture(frames=20, height=120, width=160)
    with ThreadPoolExecutor(3) as pool:
        videos = list(pool.map(encode, [frames] * 3))
    assert videos[0] == videos[1] == videos[2]
    assert not any(name in videos[0].data for name in (b"Lavf", b"creation_time"))


def test_many_frames_stream_through() -> None:
    frame_count = 300
    with encoder() as video:
        for i in range(frame_count):
            video.write(large_frame(i % 256))
        assert probe_video(video.finish().data).frames == frame_count


# What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((240, 321, 3), np.uint8),
        np.zeros((240, 320, 4), np.uint8),
        np.zeros((240, 320), np.uint8),
        np.zeros((240, 320, 3), np.float32),
    ],
    ids=lambda frame: f"{frame.dtype}{frame.shape}",
)
def test_frame_that_does_not_fit_the_video_is_refused(frame: Any) -> None:
    with encoder() as video:
        video.write(large_frame())
        with pytest.raises(EncodeFailed, match=r"frame 1 is .* takes uint8 \(240, 320, 3\)"):
            video.write(frame)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e-9])
def test_impossible_frame_rate_is_refused(fps: float) -> None:
    with pytest.raises(EncodeFailed, match="positive frame rate") as caught:
        encode(moving_picture(frames=1), fps=fps)
    assert caught.value.field == "fps"


def test_bad_metadata_is_refused_as_for_images() -> None:
    with pytest.raises(EncodeFailed, match="reserved"):
        encode(moving_picture(frames=1), metadata={"latentq": "x"})


@pytest.mark.parametrize(("width", "height"), [(0, 240), (320, 0)])
def test_video_without_pixels_is_refused(width: int, height: int) -> None:
    with pytest.raises(EncodeFailed, match="no pixels"):
        encoder(width=width, height=height)


@pytest.mark.parametrize(("frames", "message"), [([], "without frames"), ([np.zeros(3)], "a frame is uint8")])
def test_clip_without_frames_is_refused(frames: list[Any], message: str) -> None:
    with pytest.raises(EncodeFailed, match=message):
        encode(frames)


def test_finish_without_a_frame_is_refused(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    with pytest.raises(EncodeFailed, match="without frames"), encoder() as video:
        video.finish()
    assert_nothing_left(started, folder)


def test_encoder_is_used_inside_with_and_once() -> None:
    with pytest.raises(RuntimeError, match="inside `with`"):
        encoder().write(large_frame())
    with encoder() as video:
        video.write(large_frame())
        video.finish()
        with pytest.raises(RuntimeError, match="nothing after finish"):
            video.write(large_frame())


@pytest.mark.parametrize("data", [b"", b"no video", b"#EXTM3U\nfile:///etc/passwd\n"])
def test_reading_what_is_no_mp4_is_a_value_error(data: bytes) -> None:
    for read in (probe_video, decode_video):
        with pytest.raises(ValueError, match="ffmpeg cannot read this as an MP4"):
            read(data)


# When ffmpeg or the caller fails ------------------------------------------------------------------------


def test_success_leaves_nothing(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    encode(moving_picture(frames=2))
    assert_nothing_left(started, folder)


def test_an_exception_in_the_middle_leaves_nothing(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    def frames() -> Iterator[Frames]:
        yield large_frame()
        yield large_frame()
        assert len(list(folder.iterdir())) == 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        encode(frames())
    assert_nothing_left(started, folder)


@pytest.mark.parametrize("frame_count", [1, 40])
def test_broken_ffmpeg_is_quoted(
    frame_count: int,
    started: list[subprocess.Popen[bytes]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_fake_ffmpeg("echo 'Unknown encoder libx264' >&2; exit 1", tmp_path=tmp_path, monkeypatch=monkeypatch)
    with pytest.raises(EncodeFailed, match="Unknown encoder libx264"):
        encode(moving_picture(frames=frame_count))
    assert_nothing_left(started, folder)


def test_flood_of_errors_neither_blocks_nor_fills_the_message(
    started: list[subprocess.Popen[bytes]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "yes 'frame is corrupt' | head -c 500000 >&2; cat >/dev/null; echo 'the end' >&2; exit 3"
    use_fake_ffmpeg(script, tmp_path=tmp_path, monkeypatch=monkeypatch)
    with pytest.raises(EncodeFailed, match="status 3") as caught:
        encode([large_frame()] * 3)
    assert caught.value.message.endswith("the end")
    assert len(caught.value.message) < 2 * video_encoding.STDERR_TAIL_BYTES
    assert_nothing_left(started, folder)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exec tail -f /dev/null", "took nothing"),
        ("cat >/dev/null; exec tail -f /dev/null", "did not finish"),
    ],
    ids=["while writing", "while finishing"],
)
def test_hanging_ffmpeg_is_given_up(
    script: str,
    message: str,
    started: list[subprocess.Popen[bytes]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_fake_ffmpeg(script, tmp_path=tmp_path, monkeypatch=monkeypatch)
    if message == "took nothing":
        monkeypatch.setattr(video_encoding, "WRITE_STALL_S", 0.2)
    monkeypatch.setattr(video_encoding, "FINISH_TIMEOUT_S", 0.2)
    with pytest.raises(EncodeFailed, match=message):
        encode([large_frame()] * 2)
    assert_nothing_left(started, folder)


def test_missing_ffmpeg_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(EncodeFailed, match=r"could not start ffmpeg: .*/nowhere/ffmpeg"):
        encode(moving_picture(frames=1))

    def nothing_found() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", nothing_found)
    with pytest.raises(EncodeFailed, match=r"install `latentq\[worker\]`"):
        encode(moving_picture(frames=1))
    assert list(folder.iterdir()) == []


def test_unusable_temporary_folder_is_an_encode_error(folder: Path) -> None:
    folder.rmdir()
    with pytest.raises(EncodeFailed, match="could not start ffmpeg"):
        encode(moving_picture(frames=1))
