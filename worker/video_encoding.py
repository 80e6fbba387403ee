"""Decoded frames to an H.264 MP4, one frame at a time, and an MP4 back to frames and facts.

Owns the ffmpeg process that encodes and everything said to it: size, rate, colour, quality and metadata.
The frames are piped to the ffmpeg binary that imageio-ffmpeg bundles, without its Python layer, which
rescales odd sizes in silence; PyAV is no faster, the encoder dominates. Nobody holds the clip: memory
stays at a few raw frames.

DESIGN. A VideoEncoder belongs to one thread; several may run side by side. Nothing can block for ever:
ffmpeg's stderr goes to a file (no pipe that fills up), stdin is non-blocking and waited for with a bound,
the wait for the end has one too. Its files lie in one temporary folder. Whatever way the `with` is left,
the process has been reaped and the folder is gone. If this process is killed instead, ffmpeg reads the
end of its stdin and ends by itself, but the folder `latentq-video-*` stays, until a worker that starts finds
it a day old (temporary_folders.py).
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import IO, Self, cast

import numpy as np
import numpy.typing as npt

from broker_config.errors import EncodeFailed
from worker.image_encoding import Encoded, canonical_json, metadata_document
from worker.temporary_folders import VIDEO_PREFIX

#: 81 frames of 832x480 in 0.5 s against 1.4 s for medium, on two cores; what it costs is size, not quality.
X264_PRESET = "veryfast"
#: "Visually lossless or nearly so" (the H.264 page of ffmpeg's wiki), where the default of 23 is a
#: compromise.
X264_CRF = 18
#: x264's bytes depend on its number of threads (measured: 1, 2, 4, 6 and 8 give five different files).
#: Pinned, so that equal frames give equal bytes whatever the number of cores. Four keep two cores busy,
#: and leave the other cores of a larger machine to the other videos.
X264_THREADS = 4
#: RGB to BT.709 in limited range, in the pixels (scale) and in the tags (setparams). A tag without the
#: conversion, or the reverse, shifts saturated colours. setparams, because ffmpeg 9 takes the tags from
#: the filtered frames: the options `-color_trc` and `-color_primaries` were dropped (measured).
COLOUR_FILTER = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd,"
    "format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
#: 24000/1001 and its kin are the finest steps that film and television use.
FPS_MAX_DENOMINATOR = 1001

#: How long ffmpeg may take nothing from the pipe. A 4K frame costs a busy machine a second; a minute
#: without one byte is a hang.
WRITE_STALL_S = 60.0
#: Encoding the frames that are still buffered, and moving the index to the front of the file.
FINISH_TIMEOUT_S = 300.0
#: From a closed pipe, or a kill, to the end of the process.
EXIT_TIMEOUT_S = 10.0
#: Decoding a whole clip again.
DECODE_TIMEOUT_S = 300.0
#: What of ffmpeg's last words goes into an error, which is stored with the job.
STDERR_TAIL_BYTES = 1000

#: The video of the first input, no frame doubled or dropped to even out the rate.
_EVERY_FRAME = ("-map", "0:v:0", "-fps_mode", "passthrough")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What an MP4 holds."""

    #: Stored width; even, so up to one pixel wider than the frames that were written.
    width: int
    #: Stored height; likewise.
    height: int
    #: Frames a second.
    fps: float
    #: Frames that decode.
    frames: int
    #: As ffmpeg names it, such as `yuv420p`.
    pixel_format: str
    #: As ffmpeg names it, such as `h264`.
    codec: str
    #: The comment tag, JSON in our files; None without one.
    comment: str | None


class VideoEncoder:
    """Encodes frames into an MP4 while they come.

    ::

        with VideoEncoder(width=832, height=480, fps=16, metadata={}, provenance=None) as encoder:
            for frame in frames:
                encoder.write(frame)
            video = encoder.finish()

    An odd size is padded by repeating the last row or column, since 4:2:0 has one chroma sample for 2x2
    pixels; the comment then carries `original_size`. Raises EncodeFailed.
    """

    def __init__(
        self,
        *,
        width: int,
        height: int,
        fps: float,
        metadata: Mapping[str, str],
        provenance: Mapping[str, object] | None,
    ) -> None:
        if width < 1 or height < 1:
            raise EncodeFailed(f"a video of {width}x{height} pixels has no pixels")
        self._shape = (int(height), int(width), 3)
        self._rate = _frame_rate(fps)
        document = metadata_document(metadata, provenance)
        if width % 2 or height % 2:
            document["original_size"] = {"width": int(width), "height": int(height)}
        self._comment = canonical_json(document) if document else None
        self._frames = 0
        self._resources = ExitStack()
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=VIDEO_PREFIX)))
                process = self._start()
            except OSError as error:
                raise EncodeFailed(f"could not start ffmpeg: {error}") from error
            stack.callback(_reap, process)
            os.set_blocking(_stdin(process).fileno(), False)
            self._process = process
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process = None
        self._resources.close()

    def write(self, frame: npt.NDArray[np.uint8]) -> None:
        """Append `frame`, uint8 (height, width, 3) RGB."""
        process = self._running()
        if frame.dtype != np.uint8 or frame.shape != self._shape:
            raise EncodeFailed(
                f"frame {self._frames} is {frame.dtype} {frame.shape}, this video takes uint8 {self._shape}"
            )
        height, width, _ = self._shape
        if width % 2 or height % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        try:
            stalled = not _feed(_stdin(process).fileno(), np.ascontiguousarray(frame).data.cast("B"))
        except OSError as error:
            # ffmpeg closed its end, so it is about to say why and to go.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=EXIT_TIMEOUT_S)
            raise self._failure(f"ffmpeg stopped at frame {self._frames}") from error
        if stalled:
            raise self._failure(f"ffmpeg took nothing of frame {self._frames} for {WRITE_STALL_S:g} s")
        self._frames += 1

    def finish(self) -> Encoded:
        """The finished file. No frame can be written afterwards."""
        process = self._running()
        if not self._frames:
            raise EncodeFailed("a video without frames cannot be encoded")
        _stdin(process).close()
        try:
            status = process.wait(timeout=FINISH_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise self._failure(f"ffmpeg did not finish within {FINISH_TIMEOUT_S:g} s") from error
        if status:
            raise self._failure(f"ffmpeg ended with status {status} after {self._frames} frames")
        self._process = None
        try:
            data = self._video_path.read_bytes()
        except OSError as error:
            raise EncodeFailed(f"could not read the finished video: {error}") from error
        return Encoded(data=data, content_type="video/mp4", extension="mp4")

    @property
    def _video_path(self) -> Path:
        return self._folder / "video.mp4"

    def _start(self) -> subprocess.Popen[bytes]:
        with open(self._folder / "stderr", "wb") as stderr:
            return subprocess.Popen(
                [_ffmpeg_exe(), *self._arguments()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                bufsize=0,
                # Out of reach of a terminal's Ctrl-C: the worker finishes its job, so must ffmpeg.
                process_group=0,
            )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("a VideoEncoder is used inside `with`, and takes nothing after finish()")
        return self._process

    def _failure(self, what: str) -> EncodeFailed:
        """The error to raise, with ffmpeg's last words; ends ffmpeg."""
        process, self._process = self._running(), None
        _reap(process)
        with open(self._folder / "stderr", "rb") as stderr:
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - STDERR_TAIL_BYTES))
            return EncodeFailed(f"{what}: {_last_words(stderr.read())}")

    def _arguments(self) -> list[str]:
        height, width, _ = self._shape
        size = f"{width + width % 2}x{height + height % 2}"
        rate = f"{self._rate.numerator}/{self._rate.denominator}"
        # fmt: off
        return [
            "-hide_banner", "-nostdin", "-loglevel", "error", "-y",
            "-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", size, "-framerate", rate,
            "-i", "pipe:0",
            *self._comment_arguments(),
            *_EVERY_FRAME, "-vf", COLOUR_FILTER,
            "-c:v", "libx264", "-preset", X264_PRESET, "-crf", str(X264_CRF), "-threads", str(X264_THREADS),
            # No version of ffmpeg in the file: equal frames, equal bytes.
            "-fflags", "+bitexact", "-flags:v", "+bitexact",
            # The index in front, so that a browser plays while it loads. Needs a file that seeks, not a pipe.
            "-movflags", "+faststart", "-f", "mp4", str(self._video_path),
        ]
        # fmt: on

    def _comment_arguments(self) -> list[str]:
        if self._comment is None:
            return ["-map_metadata", "-1"]
        # Through a file: on the command line a prompt would be in everybody's `ps`, and end at 128 KiB.
        path = self._folder / "comment"
        escaped = re.sub(r"([=;#\\\n])", r"\\\1", self._comment)
        path.write_text(f";FFMETADATA1\ncomment={escaped}\n", encoding="utf-8", newline="\n")
        return ["-f", "ffmetadata", "-i", str(path), "-map_metadata", "1"]


def encode_video(
    frames: Iterable[npt.NDArray[np.uint8]],
    *,
    fps: float,
    metadata: Mapping[str, str],
    provenance: Mapping[str, object] | None,
) -> Encoded:
    """Encode `frames`, each uint8 (height, width, 3) RGB, all of one size. Raises EncodeFailed."""
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise EncodeFailed("a video without frames cannot be encoded")
    if first.ndim != 3:
        raise EncodeFailed(f"frame 0 is {first.dtype} {first.shape}, a frame is uint8 (height, width, 3)")
    height, width, _ = first.shape
    with VideoEncoder(width=width, height=height, fps=fps, metadata=metadata, provenance=provenance) as encoder:
        encoder.write(first)
        for frame in iterator:
            encoder.write(frame)
        return encoder.finish()


def probe_video(data: bytes) -> VideoInfo:
    """What the MP4 `data` holds; each frame is decoded to be counted. Raises ValueError for anything else."""
    with tempfile.TemporaryDirectory(prefix=VIDEO_PREFIX) as folder:
        crc, tags = Path(folder, "crc"), Path(folder, "tags")
        _, stderr = _read_with_ffmpeg(
            data,
            folder=Path(folder),
            outputs=[*_EVERY_FRAME, "-f", "framecrc", str(crc), "-f", "ffmetadata", str(tags)],
        )
        crc_text, tag_text = crc.read_text(encoding="ascii"), tags.read_text(encoding="utf-8")
    codec, pixel_format, width, height = _stream_facts(stderr)
    # The rate in ffmpeg's log is rounded to two places; this line is the exact duration of a frame.
    tick = re.search(r"^#tb 0: (\d+)/(\d+)$", crc_text, flags=re.MULTILINE)
    if tick is None:
        raise ValueError("this video has no frames")
    comment = re.search(r"^comment=((?:\\.|[^\\\n])*)$", tag_text, flags=re.MULTILINE | re.DOTALL)
    return VideoInfo(
        width=width,
        height=height,
        fps=int(tick[2]) / int(tick[1]),
        frames=sum(not line.startswith("#") for line in crc_text.splitlines()),
        pixel_format=pixel_format,
        codec=codec,
        comment=re.sub(r"\\(.)", r"\1", comment[1], flags=re.DOTALL) if comment else None,
    )


def decode_video(data: bytes) -> npt.NDArray[np.uint8]:
    """The frames of the MP4 `data` as uint8 (frames, height, width, 3) RGB, in the stored (even) size.

    Holds the whole clip in memory. Raises ValueError for anything else.
    """
    with tempfile.TemporaryDirectory(prefix=VIDEO_PREFIX) as folder:
        raw, stderr = _read_with_ffmpeg(
            data,
            folder=Path(folder),
            outputs=[*_EVERY_FRAME, "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"],
        )
    _, _, width, height = _stream_facts(stderr)
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def _frame_rate(fps: float) -> Fraction:
    try:
        rate = Fraction(float(fps)).limit_denominator(FPS_MAX_DENOMINATOR)
    except (ValueError, OverflowError):  # NaN, infinity
        rate = Fraction(0)
    if rate <= 0:
        raise EncodeFailed(f"fps {fps} is not a positive frame rate", field="fps")
    return rate


def _ffmpeg_exe() -> str:
    """Path of the ffmpeg binary: `IMAGEIO_FFMPEG_EXE`, the bundled one, or the system's."""
    try:
        import imageio_ffmpeg  # Here, not above: a worker that only makes images does without it.

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        raise EncodeFailed(
            f"video needs ffmpeg: install `latentq[worker]` or set IMAGEIO_FFMPEG_EXE ({error})"
        ) from error


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", process.stdin)  # Always a pipe here.


def _feed(descriptor: int, data: memoryview) -> bool:
    """Write all of `data` to the non-blocking pipe; False if it takes nothing for WRITE_STALL_S."""
    poller = select.poll()
    poller.register(descriptor, select.POLLOUT)
    while data:
        if not poller.poll(WRITE_STALL_S * 1000):
            return False
        # Writable means one free page at least, and the frame is longer: a short write is the rule.
        with suppress(BlockingIOError):
            data = data[os.write(descriptor, data) :]
    return True


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` if it still runs, and collect it."""
    process.kill()
    with suppress(subprocess.TimeoutExpired):  # Stuck in the kernel, on a dead network disk: not ours to wait.
        process.wait(timeout=EXIT_TIMEOUT_S)
    _stdin(process).close()


def _last_words(stderr: bytes) -> str:
    text = stderr[-STDERR_TAIL_BYTES:].decode(errors="replace").strip()
    return " | ".join(text.splitlines()) or "it gave no reason"


def _read_with_ffmpeg(data: bytes, *, folder: Path, outputs: Sequence[str]) -> tuple[bytes, str]:
    """ffmpeg's stdout and its log, after it decoded the MP4 `data` into `outputs`."""
    path = folder / "video.mp4"
    path.write_bytes(data)
    # The demuxer is named: ffmpeg would else guess, and take a file for a playlist that names other files.
    command = [_ffmpeg_exe(), "-hide_banner", "-nostdin", "-y", "-f", "mov", "-i", str(path), *outputs]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DECODE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"ffmpeg did not read this video within {DECODE_TIMEOUT_S:g} s") from error
    if done.returncode:
        raise ValueError(f"ffmpeg cannot read this as an MP4: {_last_words(done.stderr)}")
    return done.stdout, done.stderr.decode(errors="replace")


def _stream_facts(log: str) -> tuple[str, str, int, int]:
    """Codec, pixel format, width and height, from the first `Stream … Video:` line, which is the input's."""
    found = re.search(r"Stream #0:\d+.*?: Video: (\w+).*?, (\w+)(?:\([^)]*\))?, (\d+)x(\d+)", log)
    if found is None:
        raise ValueError(f"ffmpeg sees no video in this file: {_last_words(log.encode())}")
    return found[1], found[2], int(found[3]), int(found[4])
