"""What earlier runs have done: each task is looked up before anything is denoised.

A task's job has the task's id. If that job came to nothing, the next one is the same id with `-r1` behind it, then
`-r2`: latents that are still retained are decoded again under it, and only where they are gone is the prompt denoised
again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from broker_config.errors import JobConflict, ResultExpired
from broker_config.job_status import JobStatus
from producer.client import DecodeClient
from producer.prompt_farm.plan import Task

#: Jobs asked for in one round trip.
_CHUNK: Final = 512
#: Decoding again waits this long for room in the queue.
_BLOCK_S: Final = 60.0


@dataclass(kw_only=True, slots=True)
class Adopted:
    """Tasks, by what is to be done with them."""

    #: A job of theirs exists, or waits in the spool: its result is fetched when it is there.
    waiting: list[Task] = field(default_factory=list)
    #: Of these, the ids of jobs that wait in the spool.
    spooled: set[str] = field(default_factory=set)
    #: Latents are nowhere: denoise.
    missing: list[Task] = field(default_factory=list)


def adopt(
    client: DecodeClient,
    tasks: Sequence[Task],
    *,
    spooled: Callable[[Collection[str]], set[str]] = lambda ids: set(),
) -> Adopted:
    """Looks tasks up in the broker, and in the spool.

    Raises:
        BrokerError: the broker does not answer.
    """
    adopted = Adopted()
    for start in range(0, len(tasks), _CHUNK):
        left = list(tasks[start : start + _CHUNK])
        while left:
            left = _look(client, left, adopted, spooled)
    return adopted


def _look(
    client: DecodeClient, tasks: list[Task], adopted: Adopted, spooled: Callable[[Collection[str]], set[str]]
) -> list[Task]:
    """Looks one job of each task up. Returns the tasks whose next job is to be looked up."""
    ids = [task.submit_id for task in tasks]
    kept = spooled(ids)
    found = client.store.find(ids)
    again = []
    for task in tasks:
        snapshot = found.get(task.submit_id)
        following = dataclasses.replace(task, attempt=task.attempt + 1)
        if snapshot is None and task.submit_id in kept:
            adopted.waiting.append(task)
            adopted.spooled.add(task.submit_id)
        elif snapshot is None:
            adopted.missing.append(task)
        elif snapshot.status is JobStatus.EXPIRED:
            again.append(following)
        elif snapshot.status in (JobStatus.FAILED, JobStatus.CANCELED):
            _decode_again(client, task, following)
            again.append(following)
        else:
            adopted.waiting.append(task)
    return again


def _decode_again(client: DecodeClient, task: Task, following: Task) -> None:
    """Makes the next job of a task from the latents of the last one, unless there is one or they are gone."""
    if client.store.find([following.submit_id]):
        return
    try:
        client.redecode(task.submit_id, job_id=following.submit_id, block_s=_BLOCK_S)
    except (ResultExpired, JobConflict):
        return
