"""A submitted job, as its producer holds it: look, wait, fetch, cancel, decode again."""

from __future__ import annotations

import contextlib
import io
import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from broker_config.decode_result import Artifact, DecodeResult
from broker_config.errors import (
    BlobMissing,
    BrokerUnreachable,
    JobCanceled,
    JobFailed,
    JobNotFinished,
    JobNotFound,
    JobSpooled,
    ResultExpired,
    WaitTimeout,
    WrongOutput,
)
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from broker_config.tensor_header import read_header
from producer.quantities import counted

if TYPE_CHECKING:
    import torch

    from producer.client import DecodeClient


#: How often a wait for a preview looks; a small VAE takes about as long.
PREVIEW_LOOK_S: Final = 0.05


class JobHandle:
    """One job of a client. Cheap: holds the id, asks the broker for everything else."""

    def __init__(self, client: DecodeClient, job_id: str) -> None:
        self._client = client
        #: The job's id; `client.job(id)` makes the handle again, in any process.
        self.id = job_id
        #: The result, once it was seen: a job succeeds once, and then only its retention can end.
        self._result: DecodeResult | None = None

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"

    def snapshot(self) -> JobSnapshot:
        """The job as it stands.

        Raises:
            JobSpooled: it waits in this client's spool; the broker does not have it yet.
            JobNotFound: no such job.
        """
        try:
            found = self._client.store.snapshot(self.id)
        except (JobNotFound, BrokerUnreachable) as error:
            spool = self._client.spool
            if spool is None or not spool.spool.holds([self.id]):
                raise
            raise JobSpooled(
                f"job {self.id} waits in the spool {spool.spool.folder} until the broker takes it", job_id=self.id
            ) from error
        self._result = found.result
        return found

    def status(self) -> JobStatus:
        """Where the job is."""
        return self.snapshot().status

    def wait(self, timeout: float | None = None) -> JobSnapshot:
        """Blocks until the job ended, however it ended.

        Args:
            timeout: seconds; None: without bound.

        Raises:
            WaitTimeout: it did not end in time; it goes on.
        """
        for job in self._client.as_completed([self], timeout=timeout):
            return job.snapshot()
        raise WaitTimeout(f"job {self.id} did not finish within {timeout} s; it goes on", job_id=self.id)

    def result(self) -> DecodeResult:
        """The record of a job that succeeded.

        Raises:
            JobNotFinished, JobFailed, JobCanceled, ResultExpired: it did not, or no longer has one.
        """
        return finished_result(self.snapshot())

    def artifacts(self) -> list[tuple[Artifact, bytes]]:
        """Every artifact with its bytes, checked against its sha256.

        Raises:
            JobNotFinished, JobFailed, JobCanceled, ResultExpired: as `result`.
            BlobMissing, BlobCorrupt: the bytes are gone or damaged.
        """
        result = self._result or self.result()
        try:
            return [(item, self._client.blobs.get(item.blob)) for item in result.artifacts]
        except BlobMissing:
            self.result()  # says so if the retention has ended meanwhile
            raise

    def preview(self, timeout: float | None = 0.0) -> Image.Image | None:
        """What a small VAE makes of the first picture of a job with `preview`, while its own VAE is still at work.

        Args:
            timeout: longest wait, seconds; None: until the job ended.

        Returns:
            None: there is none yet, or the job ended without: its result says why, in `decoded_by["preview"]`.

        Raises:
            JobNotFound: no such job.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ended = self.status().is_terminal  # looked at first: a preview comes before the end
            if (picture := self.shown_preview()) is not None or ended:
                return picture
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(PREVIEW_LOOK_S)

    def shown_preview(self) -> Image.Image | None:
        """The preview, if it is there now."""
        data = self._client.store.preview(self.id)
        if data is None:
            return None
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return picture

    def images(self) -> list[Image.Image]:
        """The pictures of a png, jpg or webp job, one for each item of the batch.

        Raises:
            WrongOutput: the job made something else.
        """
        pictures: list[Image.Image] = []
        for artifact, data in self.artifacts():
            if not artifact.content_type.startswith("image/"):
                raise WrongOutput(
                    f"job {self.id} made {artifact.extension}, not images: use .video() or .tensor()",
                    job_id=self.id,
                )
            picture = Image.open(io.BytesIO(data))
            picture.load()
            pictures.append(picture)
        return pictures

    def image(self) -> Image.Image:
        """The first picture."""
        return self.images()[0]

    def videos(self) -> list[bytes]:
        """The clips of an mp4 job, one file for each item of the batch.

        Raises:
            WrongOutput: the job made something else.
        """
        clips = []
        for artifact, data in self.artifacts():
            if not artifact.content_type.startswith("video/"):
                raise WrongOutput(
                    f"job {self.id} made {artifact.extension}, not video: use .images() or .tensor()",
                    job_id=self.id,
                )
            clips.append(data)
        return clips

    def video(self) -> bytes:
        """The first clip, as the bytes of an mp4 file."""
        return self.videos()[0]

    def array(self) -> np.ndarray[Any, Any]:
        """The numbers of a tensor or uint8 job, as numpy, stacked over the batch.

        Returns:
            tensor: (B, 3, H, W) or (B, 3, F, H, W) float16 or float32 (bfloat16 is widened, exactly).
            uint8: (B, H, W, 3) or (B, F, H, W, 3).

        Raises:
            WrongOutput: the job made something else.
        """
        return np.stack([_as_array(data) for data in self._tensor_files()])

    def tensor(self) -> torch.Tensor:
        """The numbers of a tensor or uint8 job, as torch, stacked over the batch, in their own dtype.

        Raises:
            WrongOutput: the job made something else.
        """
        import torch

        items = []
        for data in self._tensor_files():
            header = read_header(data)
            flat = torch.frombuffer(bytearray(data[header.data_start :]), dtype=getattr(torch, header.dtype))
            items.append(flat.reshape(header.shape))
        return torch.stack(items)

    def cancel(self) -> JobStatus:
        """Cancels the job: at once while it is queued, between two stages while it runs.

        A job in the spool of this client is taken out of it, and is unknown afterwards. While the broker does not
        answer it stays there: it may have been handed over without our hearing of it.

        Returns where the job is now: `canceled`, `processing` (asked for), or the state it already ended in.

        Raises:
            JobNotFound: no such job.
            BrokerError: the broker does not answer; nothing was canceled.
        """
        spool = self._client.spool
        with spool.spool.withdrawn(self.id) if spool is not None else contextlib.nullcontext(False) as kept:
            try:
                word = self._client.store.cancel(self.id)
            except JobNotFound:
                if not kept:
                    raise
                word = str(JobStatus.CANCELED)
        return JobStatus.PROCESSING if word == "requested" else JobStatus(word)

    def redecode(self, **options: Any) -> JobHandle:
        """Decodes the same latents again, as a new job with other options (see `DecodeClient.redecode`)."""
        return self._client.redecode(self.id, **options)

    def ack(self) -> None:
        """Says that the result is safe elsewhere: latents and artifacts are freed before their retention ends.

        Raises:
            JobNotFinished: the job has not ended.
        """
        if not self.status().is_terminal:
            raise JobNotFinished(f"job {self.id} has not finished; cancel it instead", job_id=self.id)
        self._client.store.retire(self.id)

    def _tensor_files(self) -> list[bytes]:
        files = []
        for artifact, data in self.artifacts():
            if artifact.extension != "safetensors":
                raise WrongOutput(
                    f"job {self.id} made {artifact.extension}, not tensors: submit with output='tensor' or 'uint8'",
                    job_id=self.id,
                )
            files.append(data)
        return files


def finished_result(snapshot: JobSnapshot) -> DecodeResult:
    """The result record of a job that succeeded.

    Raises:
        JobNotFinished, JobFailed, JobCanceled, ResultExpired: it did not, or no longer has one.
    """
    job_id = snapshot.job_id
    if snapshot.status is JobStatus.SUCCEEDED and snapshot.result is not None:
        return snapshot.result
    if snapshot.status is JobStatus.FAILED:
        last = snapshot.errors[-1] if snapshot.errors else {"code": "error", "message": "no error was recorded"}
        raise JobFailed(
            f"job {job_id} failed after {counted(snapshot.attempts, 'attempt')}: {last['message']} [{last['code']}]; "
            "its latents are retained, decode them again with redecode",
            job_id=job_id,
            error_code=str(last["code"]),
        )
    if snapshot.status is JobStatus.CANCELED:
        raise JobCanceled(f"job {job_id} was canceled", job_id=job_id)
    if snapshot.status is JobStatus.EXPIRED:
        raise ResultExpired(
            f"the retention of job {job_id} has ended: its latents and result are gone, submit the latents again",
            job_id=job_id,
        )
    raise JobNotFinished(f"job {job_id} is {snapshot.status}: wait for it", job_id=job_id)


def _as_array(data: bytes) -> np.ndarray[Any, Any]:
    header = read_header(data)
    raw = memoryview(data)[header.data_start :]
    if header.dtype == "bfloat16":  # numpy has none; its words are the upper halves of float32's
        words = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16
        return words.view(np.float32).reshape(header.shape)
    return np.frombuffer(raw, dtype=header.dtype).reshape(header.shape)
