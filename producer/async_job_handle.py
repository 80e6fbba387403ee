"""A submitted job, as its producer holds it in an event loop. What each call does is `JobHandle`'s."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from broker_config.decode_result import Artifact, DecodeResult
from broker_config.errors import WaitTimeout
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from producer.job_handle import PREVIEW_LOOK_S, JobHandle

if TYPE_CHECKING:
    import torch

    from producer.async_client import AsyncDecodeClient


class AsyncJobHandle:
    """One job of an `AsyncDecodeClient`. Cheap: holds the id, asks the broker for everything else."""

    def __init__(self, client: AsyncDecodeClient, job_id: str) -> None:
        self._client = client
        self._blocking = JobHandle(client.blocking, job_id)
        #: The job's id; `client.job(id)` makes the handle again, in any process.
        self.id = job_id

    def __repr__(self) -> str:
        return f"AsyncJobHandle({self.id!r})"

    async def snapshot(self) -> JobSnapshot:
        """The job as it stands. As `JobHandle.snapshot`."""
        return await self._client.run(self._blocking.snapshot)

    async def status(self) -> JobStatus:
        """Where the job is."""
        return (await self.snapshot()).status

    async def wait(self, timeout: float | None = None) -> JobSnapshot:  # noqa: ASYNC109  as the twin's
        """Waits until the job ended, however it ended. As `JobHandle.wait`."""
        async for job in self._client.as_completed([self], timeout=timeout):
            return await job.snapshot()
        raise WaitTimeout(f"job {self.id} did not finish within {timeout} s; it goes on", job_id=self.id)

    async def result(self) -> DecodeResult:
        """The record of a job that succeeded. As `JobHandle.result`."""
        return await self._client.run(self._blocking.result)

    async def artifacts(self) -> list[tuple[Artifact, bytes]]:
        """Every artifact with its bytes, checked against its sha256. As `JobHandle.artifacts`."""
        return await self._client.transfer(self._blocking.artifacts)

    async def preview(self, timeout: float | None = 0.0) -> Image.Image | None:  # noqa: ASYNC109  as the twin's
        """The preview of a job with `preview`; None: there is none (yet). As `JobHandle.preview`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ended = (await self.status()).is_terminal
            if (picture := await self.shown_preview()) is not None or ended:
                return picture
            if deadline is not None and time.monotonic() >= deadline:
                return None
            await asyncio.sleep(PREVIEW_LOOK_S)

    async def shown_preview(self) -> Image.Image | None:
        """The preview, if it is there now."""
        return await self._client.transfer(self._blocking.shown_preview)

    async def images(self) -> list[Image.Image]:
        """The pictures of a png, jpg or webp job. As `JobHandle.images`."""
        return await self._client.transfer(self._blocking.images)

    async def image(self) -> Image.Image:
        """The first picture."""
        return (await self.images())[0]

    async def videos(self) -> list[bytes]:
        """The clips of an mp4 job. As `JobHandle.videos`."""
        return await self._client.transfer(self._blocking.videos)

    async def video(self) -> bytes:
        """The first clip, as the bytes of an mp4 file."""
        return (await self.videos())[0]

    async def array(self) -> np.ndarray[Any, Any]:
        """The numbers of a tensor or uint8 job, as numpy. As `JobHandle.array`."""
        return await self._client.transfer(self._blocking.array)

    async def tensor(self) -> torch.Tensor:
        """The numbers of a tensor or uint8 job, as torch. As `JobHandle.tensor`."""
        return await self._client.transfer(self._blocking.tensor)

    async def cancel(self) -> JobStatus:
        """Cancels the job. As `JobHandle.cancel`."""
        return await self._client.run(self._blocking.cancel)

    async def redecode(self, **options: Any) -> AsyncJobHandle:
        """Decodes the same latents again, as a new job with other options."""
        return await self._client.redecode(self.id, **options)

    async def ack(self) -> None:
        """Says that the result is safe elsewhere. As `JobHandle.ack`."""
        await self._client.run(self._blocking.ack)
