"""The third stage: encode what the device made, store it, complete the job."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import diffusers
import torch

from broker_config.blob_store import draft
from broker_config.decode_result import Artifact, DecodeResult
from broker_config.errors import EncodeFailed, LatentqError
from broker_config.messages import Output
from worker.attempts import AttemptReporter
from worker.image_encoding import Encoded, encode_image
from worker.latent_io import write_tensor
from worker.leases import LeaseKeeper
from worker.stages import (
    Abandoned,
    ChunkStream,
    Failure,
    Patience,
    Pixels,
    StreamClosed,
    Timer,
    Work,
    failure_of,
)
from worker.video_encoding import VideoEncoder

logger = logging.getLogger(__name__)

#: Jobs that are completed at a time; encoding itself runs in the encode pool.
_FINISHERS: Final = 2
#: Storing and completing. A bucket that swallows what it is sent is given up after three minutes, then tried again.
_STORE_LIMIT_S: Final = 900.0
#: How often the device looks whether it is still to wait for room.
_ROOM_S: Final = 0.5
#: Artifacts that come along with one job's success, together: a script holds the broker while it takes them in.
_INLINE_BYTES: Final = 4 << 20


class FinishStage:
    """Encodes and completes jobs in the background."""

    def __init__(
        self, *, reporter: AttemptReporter, leases: LeaseKeeper, patience: Patience, encode_threads: int
    ) -> None:
        self._reporter = reporter
        self._leases = leases
        self._patience = patience
        self._finishers = ThreadPoolExecutor(_FINISHERS, thread_name_prefix="finish")
        self._encoders = ThreadPoolExecutor(encode_threads, thread_name_prefix="encode")
        self._encode_threads = encode_threads
        #: Jobs that are decoded but not completed; the device waits when it is used up.
        self._room = threading.Semaphore(_FINISHERS + 2)

    def accept(self, work: Work, stream: ChunkStream) -> None:
        """Takes a job over, whose chunks are about to come. Waits while encoding is behind."""
        while not self._room.acquire(timeout=_ROOM_S):
            if self._patience.is_given_up:
                raise Abandoned
            self._leases.grant(_ROOM_S, stages=("device",))  # those before it have deadlines of their own
        self._finishers.submit(self._run, work, stream)

    def close(self) -> None:
        """Waits for what was accepted."""
        self._finishers.shutdown(wait=True)
        self._encoders.shutdown(wait=True)

    def _run(self, work: Work, stream: ChunkStream) -> None:
        try:
            self._finish(work, stream)
        except StreamClosed:
            logger.debug("decode of %s gave up", work.claim.job_id, extra={"action": "stream_closed"})
        except Abandoned:
            logger.warning("job %s left to its lease", work.claim.job_id, extra={"action": "abandoned"})
        except Exception as error:
            stream.close()
            failure = failure_of(error)
            if not isinstance(error, LatentqError):
                wrapped = EncodeFailed(f"finishing raised {type(error).__name__}: {error}")
                failure = Failure(error=wrapped, traceback=failure.traceback)
            self._report(work, failure)
        finally:
            self._room.release()

    def _report(self, work: Work, failure: Failure) -> None:
        try:
            self._reporter.fail(work.claim, failure, stage="finish")
        except Abandoned:
            logger.warning("job %s left to its lease", work.claim.job_id, extra={"action": "abandoned"})

    def _finish(self, work: Work, stream: ChunkStream) -> None:
        with Timer() as encoding:
            encoded = self._encode(work, stream)
        self._leases.enter([work.claim], "finish", limit_s=max(_STORE_LIMIT_S, work.request.timeout_s))
        if self._reporter.skip(work.claim):
            return
        work.timings_s["encode"] = encoding.s
        self._reporter.complete(work.claim, lambda: self._store(work, encoded))

    def _store(self, work: Work, encoded: Sequence[Encoded]) -> tuple[DecodeResult, dict[str, bytes]]:
        """Stores the artifacts, for a provisional lifetime, and says where they lie. Small ones are stored with the
        job's success: they come back as bytes by name."""
        inline: dict[str, bytes] = {}
        artifacts: list[Artifact] = []
        with Timer() as storing:
            for number, item in enumerate(encoded):
                name = _artifact_name(work, number, item)
                if self._reporter.is_inline(item.data) and sum(map(len, inline.values())) < _INLINE_BYTES:
                    inline[name] = item.data
                    blob = draft(name, item.data)
                else:
                    blob = self._reporter.store(name, item.data)
                artifacts.append(Artifact(blob=blob, content_type=item.content_type, extension=item.extension))
        work.timings_s["store"] = storing.s
        result = DecodeResult(
            artifacts=tuple(artifacts),
            timings_s={name: round(value, 6) for name, value in work.timings_s.items()},
            decoded_by=work.decoded_by,
        )
        return result, inline

    def _encode(self, work: Work, stream: ChunkStream) -> list[Encoded]:
        provenance = provenance_of(work) if work.request.provenance else None
        output = work.request.output
        if output is Output.TENSOR:
            return [_as_file(item) for chunk in stream for item in chunk.get()]
        if output is Output.MP4:
            return list(self._encode_clips(work, stream, provenance))
        if output is Output.UINT8:
            return _stack_frames(work, stream)
        # Few frames wait for the encoders: the bound of the stream is worth nothing if they pile up here.
        ahead: deque[Future[Encoded]] = deque()
        encoded: list[Encoded] = []
        for frame in _frames(stream):
            if len(ahead) == 2 * self._encode_threads:
                encoded.append(ahead.popleft().result())
            ahead.append(
                self._encoders.submit(
                    encode_image,
                    frame,
                    output=str(output),
                    metadata=work.request.metadata,
                    provenance=provenance,
                )
            )
        return [*encoded, *(future.result() for future in ahead)]

    def _encode_clips(
        self, work: Work, stream: ChunkStream, provenance: Mapping[str, object] | None
    ) -> Iterator[Encoded]:
        request = work.request
        frames = _frames(stream)
        for _ in range(request.batch):
            with VideoEncoder(
                width=request.width,
                height=request.height,
                fps=request.fps,
                metadata=request.metadata,
                provenance=provenance,
            ) as encoder:
                for _ in range(request.num_frames):
                    encoder.write(next(frames))
                yield encoder.finish()
        for _ in frames:
            raise EncodeFailed(f"the VAE made more than the {request.num_frames} frames that were expected")


def provenance_of(work: Work) -> dict[str, object]:
    """What an artifact says of how it was made."""
    request = work.request
    return {
        "job_id": request.job_id,
        "latents_sha256": request.latents.sha256,
        "layout": request.layout,
        "latentq": importlib.metadata.version("latentq"),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **work.decoded_by,
    }


def _frames(stream: ChunkStream) -> Iterator[Pixels]:
    for chunk in stream:
        yield from chunk.pixels()


def _stack_frames(work: Work, stream: ChunkStream) -> list[Encoded]:
    """uint8 pixels of each item: (H, W, C) of a picture, (F, H, W, C) of a clip."""
    frames = [torch.from_numpy(frame) for frame in _frames(stream)]
    per_item = work.request.num_frames
    items = [torch.stack(frames[start : start + per_item]) for start in range(0, len(frames), per_item)]
    is_clip = work.request.is_video
    return [_as_file(item if is_clip else item[0]) for item in items]


def _as_file(tensor: torch.Tensor) -> Encoded:
    return Encoded(data=write_tensor(tensor), content_type="application/vnd.safetensors", extension="safetensors")


def _artifact_name(work: Work, number: int, encoded: Encoded) -> str:
    digest = hashlib.sha256(encoded.data).hexdigest()
    # Job and attempt are in the name, so a late attempt cannot touch the winner's bytes; the digest makes
    # storing the same bytes twice harmless.
    return f"{work.claim.job_id}.{work.claim.execution[:12]}.{number}.{digest[:12]}"
