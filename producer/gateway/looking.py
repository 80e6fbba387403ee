"""Looks at jobs for many who watch: those who ask within a moment of each other share one round trip."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from broker_config.errors import JobNotFound
from broker_config.job_record import JobSnapshot
from broker_config.job_store import JobStore
from broker_config.queue_position import positions
from producer.async_client import AsyncDecodeClient

#: A watcher who waits this much longer cannot tell; two hundred of them cost twenty round trips a second.
_GATHER_S: Final = 0.05
#: Jobs in one round trip.
_MOST: Final = 256

#: A job and how many are before it, where that is known.
Seen = tuple[JobSnapshot, int | None]


class Lookout:
    """Looks at jobs on behalf of the streams of one gateway."""

    def __init__(self, client: AsyncDecodeClient) -> None:
        self._client = client
        self._asked: dict[str, asyncio.Future[Seen]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def look(self, job_id: str) -> Seen:
        """The job as it stands.

        Raises:
            JobNotFound: it is gone.
            BrokerError: the broker does not answer.
        """
        future = self._asked.get(job_id)
        if future is None:
            if not self._asked:
                task = asyncio.create_task(self._gather(), name="look-at-jobs")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            future = self._asked[job_id] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(future)

    async def _gather(self) -> None:
        await asyncio.sleep(_GATHER_S)
        asked, self._asked = self._asked, {}
        try:
            found = await self._client.run(_look, self._client.store, list(asked))
        except Exception as error:  # whatever it is: they wait for this look, and would for ever
            failure = error
            _tell(asked, lambda job_id: failure)
            return
        _tell(asked, lambda job_id: found.get(job_id, JobNotFound(f"no job {job_id}", job_id=job_id)))


def _look(store: JobStore, job_ids: list[str]) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    for start in range(0, len(job_ids), _MOST):
        jobs = list(store.find(job_ids[start : start + _MOST]).values())
        places = positions(store.connections, jobs)
        found |= {job.job_id: (job, place) for job, place in zip(jobs, places, strict=True)}
    return found


def _tell(asked: dict[str, asyncio.Future[Seen]], answer: Callable[[str], Seen | Exception]) -> None:
    for job_id, future in asked.items():
        if future.done():
            continue
        found = answer(job_id)
        if isinstance(found, Exception):
            future.set_exception(found)
            future.exception()  # it may be that nobody waits for it any more
        else:
            future.set_result(found)
