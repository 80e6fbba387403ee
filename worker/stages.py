"""The way of a batch through a worker: fetch · device · finish, each in named threads.

DESIGN. `fetch` claims a batch, reads its latents and makes sure its VAE is loaded; one batch waits ready while
the one before decodes. `device` decodes and hands pixels on, chunk by chunk, as they leave the device. `finish`
encodes, stores and completes, in a small pool; how many jobs may be in it is bounded, so a slow disk makes the
device wait instead of filling memory. Jobs of one worker may finish in another order than they were claimed.
A broker that is away delays a batch but never fails it: everything said to the broker is repeated until it
answers (`Patience`).
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeVar

import numpy as np
import torch

from broker_config.claims import Claim
from broker_config.errors import (
    BrokerError,
    DecodeFailed,
    LatentqError,
    OutOfMemory,
    WorkerError,
)
from broker_config.messages import DecodeRequest
from worker.latent_io import to_frames

logger = logging.getLogger(__name__)

T = TypeVar("T")
Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
#: Chunks of one job that may wait between device and encoder: 16 frames each.
_STREAM_CHUNKS: Final = 4
#: How often one end of a stream looks whether the other gave up.
_STREAM_S: Final = 0.1
#: What is said, as plain RuntimeErrors, when memory is short: by torch's CPU allocator and oneDNN (that it could not
#: create a primitive when there is no room for its code), and on CUDA by the driver, cuBLAS, cuDNN and Triton. torch
#: tries cuDNN's engines until one has room for its workspace, and says of none that memory was the reason
#: (aten/src/ATen/native/cudnn/Conv_v8.cpp, `run_single_conv`).
_NO_MEMORY: Final = (
    "can't allocate memory",
    "could not create a memory object",
    "could not create a primitive",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",
    "[CUDA]: out of memory",
)
_RETRY_FIRST_S: Final = 0.1
_RETRY_LONGEST_S: Final = 5.0


class Abandoned(Exception):
    """The worker is stopping and its grace period is over."""


class StreamClosed(Exception):
    """The other end of a stream gave up; what went wrong is reported there."""


class Patience:
    """Repeats what is said to the broker until it answers, or until the worker gives up."""

    def __init__(self, *, on_waited: Callable[[float], None] = lambda seconds: None) -> None:
        """Args:
        on_waited: told after each try that failed how many seconds it and the pause after it took.
        """
        self._given_up = threading.Event()
        self._on_waited = on_waited

    def give_up(self) -> None:
        """Ends every repetition, now and later."""
        self._given_up.set()

    @property
    def is_given_up(self) -> bool:
        """Whether `give_up` was called."""
        return self._given_up.is_set()

    def repeat(self, action: Callable[[], T]) -> T:
        """`action()`, again and again while the broker is away.

        Raises:
            Abandoned: the worker gave up.
        """
        pause = _RETRY_FIRST_S
        while True:
            start = time.monotonic()
            try:
                return action()
            except BrokerError as error:
                if not error.retryable or self._given_up.is_set():
                    raise Abandoned from error
                logger.warning(
                    "broker is away, trying again in %.1f s: %s",
                    pause,
                    error,
                    extra={"action": "broker_away"},
                )
                if self._given_up.wait(pause):
                    raise Abandoned from error
                self._on_waited(time.monotonic() - start)
                pause = min(pause * 2, _RETRY_LONGEST_S)


class HostChunk:
    """Pixels or floats on their way to the host, or there."""

    def __init__(self, tensor: torch.Tensor, wait: Callable[[], None] | None = None) -> None:
        """Args:
        tensor: on the host; complete once `wait` returned.
        wait: blocks until the copy is done; None: it is.
        """
        self._tensor = tensor
        self._wait = wait

    @property
    def items(self) -> int:
        """Pictures or frames in it."""
        return int(self._tensor.shape[0])

    def get(self) -> torch.Tensor:
        """The tensor, complete."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self._tensor

    def pixels(self) -> Pixels:
        """uint8 pixels as numpy."""
        return to_frames(self.get())


class ChunkStream:
    """What the device made of one job, on its way to the encoder: a bounded queue with an end."""

    def __init__(self, *, on_waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Args:
        on_waiting: told how many seconds went by while nobody had begun to take chunks.
        """
        self._queue: queue.Queue[HostChunk | None] = queue.Queue(maxsize=_STREAM_CHUNKS)
        self._closed = threading.Event()
        self._begun = threading.Event()
        self._on_waiting = on_waiting

    def put(self, chunk: HostChunk) -> None:
        """Hands a chunk on; waits while the encoder is behind.

        Raises:
            StreamClosed: the encoder gave up.
        """
        self._put(chunk)

    def end(self) -> None:
        """Says that no more chunks come."""
        self._put(None)

    def close(self) -> None:
        """Gives the stream up, from either end."""
        self._closed.set()

    def __iter__(self) -> Iterator[HostChunk]:
        self._begun.set()
        while True:
            try:
                chunk = self._queue.get(timeout=_STREAM_S)
            except queue.Empty:
                if self._closed.is_set():
                    raise StreamClosed from None
                continue
            if chunk is None:
                return
            yield chunk

    def _put(self, item: HostChunk | None) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=_STREAM_S)
            except queue.Full:
                if not self._begun.is_set():
                    self._on_waiting(_STREAM_S)
        raise StreamClosed


@dataclass(slots=True)
class Work:
    """One claimed job on its way through the stages."""

    claim: Claim
    request: DecodeRequest
    #: (B, …) as stored, on the CPU, pinned where the device is CUDA.
    latents: torch.Tensor
    #: Seconds spent in each part.
    timings_s: dict[str, float] = field(default_factory=dict)
    #: Facts of the decode for the result record.
    decoded_by: dict[str, object] = field(default_factory=dict)
    #: What came of its preview; None: it asks for none.
    preview: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong with an attempt, as text only: a kept traceback would pin the memory of its frames."""

    error: LatentqError
    traceback: str


def classify(error: BaseException) -> LatentqError:
    """The error of our tree that stands for `error`."""
    if isinstance(error, LatentqError):
        return error
    text = str(error) or type(error).__name__
    short = isinstance(error, torch.OutOfMemoryError | MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if short or any(sign in text for sign in _NO_MEMORY):
        return OutOfMemory(f"out of memory: {text.splitlines()[0][:300]}")
    return DecodeFailed(f"decoding raised {type(error).__name__}: {text[:500]}")


def failure_of(error: BaseException) -> Failure:
    """`error` as text, without its frames."""
    text = "".join(traceback.format_exception(error))[-16_000:]
    known = classify(error)
    known.__traceback__ = None
    known.__cause__ = known.__context__ = None
    return Failure(error=known, traceback=text)


def is_retryable(error: LatentqError) -> bool:
    """Whether another attempt may go better: the worker's own errors, not those of the job."""
    return error.retryable and isinstance(error, WorkerError | BrokerError)


class Stopwatch:
    """Adds up where the device's thread spends its time: busy decoding, or idle, waiting for anything else."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.busy_s = 0.0
        self.idle_s = 0.0
        self.jobs = 0

    def add(self, *, busy_s: float = 0.0, idle_s: float = 0.0, jobs: int = 0) -> None:
        """Adds to the sums."""
        with self._lock:
            self.busy_s += busy_s
            self.idle_s += idle_s
            self.jobs += jobs

    def report(self) -> dict[str, float]:
        """The sums so far."""
        with self._lock:
            return {"busy_s": round(self.busy_s, 3), "idle_s": round(self.idle_s, 3), "jobs": self.jobs}


class Timer:
    """`with Timer() as t: …` then `t.s`; `t.stop()` reads it earlier."""

    def __init__(self) -> None:
        self.s = 0.0
        self._start = 0.0

    def __enter__(self) -> Timer:
        self._start = time.perf_counter()
        return self

    def stop(self) -> float:
        """Seconds since the start, also kept in `s`."""
        self.s = time.perf_counter() - self._start
        return self.s

    def __exit__(self, *_: object) -> None:
        self.stop()
