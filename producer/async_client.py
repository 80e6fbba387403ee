"""`AsyncDecodeClient`: the asyncio twin of `DecodeClient`, with the same options, results and errors.

DESIGN. The work of a call is `DecodeClient`'s own, in a small pool of threads: hashing, checking and copying latents,
files and buckets would block the loop whatever client spoke to the broker, and one implementation cannot differ from
itself. Two pools, so that looking at jobs never queues behind moving megabytes. Waiting takes no thread: all waits of a
client hang on one subscription (`ended_feed.py`). docs/decisions/0007 has the alternatives.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from broker_config.connection import Connections, connect, connect_url
from broker_config.errors import QueueFull
from broker_config.settings import Settings, load_settings
from broker_config.vae_catalog import VaeCatalog
from producer.async_job_handle import AsyncJobHandle
from producer.client import DecodeClient
from producer.ended_feed import EndedFeed
from producer.ended_jobs import SPOOL_LOOK_S, ended_now
from producer.pixel_input import Pictures
from producer.spool_flush import TO_SPOOL
from producer.submit_attempt import LONGEST_PAUSE_S, RedecodeAttempt, SubmitAttempt
from producer.tensor_input import Latents, TensorFile

T = TypeVar("T")

#: Calls at a time that move no blobs: each is a round trip or two.
_COMMAND_THREADS: Final = 8
#: Blobs at a time; more would not be faster, and each may be hundreds of megabytes.
_TRANSFER_THREADS: Final = 4
#: Half the weight of the others for each 3: these yield, and still get a core's rest.
_TRANSFER_NICENESS: Final = 10


class AsyncDecodeClient:
    """A producer's connection to the queue, for one event loop. Not thread-safe.

    Starts without torch: torch tensors are taken when the caller has torch.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        settings: Settings,
        catalog: VaeCatalog | None = None,
        spool: Path | str | None = None,
    ) -> None:
        """Args as `DecodeClient`."""
        #: The client whose calls run in threads.
        self.blocking = DecodeClient(connections, settings=settings, catalog=catalog, spool=spool)
        #: The VAEs that jobs may name.
        self.catalog = self.blocking.catalog
        self.store = self.blocking.store
        self.blobs = self.blocking.blobs
        #: Wakes whoever waits for jobs.
        self.feed = EndedFeed(connections)
        self._commands = ThreadPoolExecutor(_COMMAND_THREADS, thread_name_prefix="commands")
        self._transfers = ThreadPoolExecutor(
            _TRANSFER_THREADS, thread_name_prefix="transfers", initializer=_let_the_loop_go_first
        )

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """A client configured by the environment (`LATENTQ_…`), with `overrides` on top. Errors as `DecodeClient`."""
        settings = load_settings(**overrides)
        return cls(connect(settings, name="latentq-client"), settings=settings, spool=settings.spool_dir)

    @classmethod
    def from_url(cls, url: str, **overrides: Any) -> Self:
        """A client of the broker at `url`."""
        settings = load_settings(redis_url=url, **overrides)
        return cls(connect_url(url, name="latentq-client"), settings=settings, spool=settings.spool_dir)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the subscription, waits for running calls and closes the connections."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.feed.close()
        self._commands.shutdown(wait=True)
        self._transfers.shutdown(wait=True)
        self.blocking.close()

    async def run(self, call: Callable[..., T], /, *args: Any, **options: Any) -> T:
        """`call(…)` in a thread that moves no blobs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._commands, functools.partial(call, *args, **options))

    async def transfer(self, call: Callable[..., T], /, *args: Any, **options: Any) -> T:
        """`call(…)` in a thread that may move blobs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._transfers, functools.partial(call, *args, **options))

    async def ping(self) -> None:
        """Asks the broker whether it answers. Errors as `DecodeClient.ping`."""
        await self.run(self.blocking.ping)

    async def submit(
        self, latents: Latents, *, pipeline: Any = None, block_s: float = 0.0, **options: Any
    ) -> AsyncJobHandle:
        """Hands latents over; when this returns, they cannot be lost. As `DecodeClient.submit`."""
        attempt = await self.transfer(self.blocking.attempt, self.blocking.taken(latents), pipeline=pipeline, **options)
        return await self._until_accepted(attempt, block_s=block_s)

    async def submit_file(
        self, path: Path | str, *, pipeline: Any = None, block_s: float = 0.0, **options: Any
    ) -> AsyncJobHandle:
        """Hands over the latents in a safetensors file with one tensor. As `DecodeClient.submit_file`."""
        attempt = await self.transfer(self.blocking.attempt, self.blocking.read(path), pipeline=pipeline, **options)
        return await self._until_accepted(attempt, block_s=block_s)

    async def submit_tensor_file(
        self, tensor: TensorFile, *, pipeline: Any = None, block_s: float = 0.0, **options: Any
    ) -> AsyncJobHandle:
        """Hands over latents that are a safetensors file in memory. As `DecodeClient.submit_tensor_file`."""
        attempt = await self.transfer(self.blocking.attempt, lambda: tensor, pipeline=pipeline, **options)
        return await self._until_accepted(attempt, block_s=block_s)

    async def encode(
        self, pictures: Pictures, *, pipeline: Any = None, block_s: float = 0.0, **options: Any
    ) -> AsyncJobHandle:
        """Hands pictures over to be made into latents. As `DecodeClient.encode`."""
        attempt = await self.transfer(self.blocking.encode_attempt, pictures, pipeline=pipeline, **options)
        return await self._until_accepted(attempt, block_s=block_s)

    async def redecode(self, job_id: str, /, *, block_s: float = 0.0, **options: Any) -> AsyncJobHandle:
        """Decodes the retained latents of a job again, with other options. As `DecodeClient.redecode`."""
        attempt = await self.run(self.blocking.redecode_attempt, job_id, **options)
        return await self._until_accepted(attempt, block_s=block_s)

    def job(self, job_id: str) -> AsyncJobHandle:
        """The handle of a job that was submitted before, here or elsewhere."""
        return AsyncJobHandle(self, job_id)

    async def as_completed(
        self,
        jobs: Iterable[AsyncJobHandle],
        *,
        timeout: float | None = None,  # noqa: ASYNC109  as the twin's
    ) -> AsyncIterator[AsyncJobHandle]:
        """Jobs as they end, however they end; stops early when `timeout` seconds have passed.

        Raises:
            JobNotFound: one of them does not exist.
        """
        waiting = {job.id: job for job in jobs}
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.feed.watching(*waiting) as watch:
            look, spooled = True, False
            while waiting:
                # Heard of: ended for sure. Otherwise everyone is looked at: at first, after a pause of the feed, and
                # now and then.
                ended = [] if look else [job_id for job_id in watch.ended if job_id in waiting]
                watch.ended.clear()
                if not ended:
                    watch.rung.clear()
                    ended, spooled = await self.run(self._look, list(waiting))
                for job_id in ended:
                    yield waiting.pop(job_id)
                if not waiting:
                    return
                left = SPOOL_LOOK_S if spooled else self.feed.look_every_s
                if deadline is not None:
                    left = min(left, deadline - time.monotonic())
                    if left <= 0:
                        return
                look = not await _rung(watch.rung, left)
                watch.rung.clear()

    # Inside ---------------------------------------------------------------------------------------------

    def _look(self, job_ids: list[str]) -> tuple[list[str], bool]:
        """Those that have ended, and whether some wait in the spool: the broker does not know these yet."""
        spool = self.blocking.spool
        spooled = spool.spool.holds(job_ids) if spool is not None else set()
        return list(ended_now(self.store, [job_id for job_id in job_ids if job_id not in spooled])), bool(spooled)

    async def _until_accepted(self, attempt: SubmitAttempt | RedecodeAttempt, *, block_s: float) -> AsyncJobHandle:
        spool = self.blocking.spool
        if spool is None or not isinstance(attempt, SubmitAttempt):
            await self._hand_over(attempt, block_s=block_s)
        elif (away := spool.away_for(attempt)) is not None:
            await self.transfer(spool.keep, attempt, away)
        else:
            try:
                await self._hand_over(attempt, block_s=block_s)
            except TO_SPOOL as error:
                await self.transfer(spool.keep, attempt, error)
        return AsyncJobHandle(self, attempt.job_id)

    async def _hand_over(self, attempt: SubmitAttempt | RedecodeAttempt, *, block_s: float) -> None:
        deadline = time.monotonic() + block_s
        while True:
            try:
                await self.transfer(attempt.once)
                return
            except QueueFull as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                await asyncio.sleep(min(left, error.retry_after_s, LONGEST_PAUSE_S))


def _let_the_loop_go_first() -> None:
    """Hashing megabytes must not keep the loop from the core that both may have to share. Linux alone has niceness of
    threads.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _TRANSFER_NICENESS)


async def _rung(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
