"""How many jobs are before one in its queue, as far as that can be said cheaply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from broker_config import keys
from broker_config.answers import pipelined
from broker_config.connection import Connections
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus

#: Ids from the head of a queue among which a job is looked for: beyond, the length of the queue stands in.
_LOOK: Final = 1000


def positions(connections: Connections, jobs: Sequence[JobSnapshot]) -> list[int | None]:
    """For each queued job how many are before it in its queue; None: it is in none.

    Exact for the first thousand; for others the length of their queue, which they are behind at most. Queues of other
    priorities and jobs that share a batch are not counted, so it is a hint, not a promise.
    """
    waiting = [job for job in jobs if job.status is JobStatus.QUEUED and job.request is not None]
    if not waiting:
        return [None] * len(jobs)
    with pipelined(connections) as pipe:
        for job in waiting:
            assert job.request is not None
            queue = keys.rq_queue(keys.queue_name(job.vae, job.request.priority))
            pipe.lpos(queue, job.job_id, maxlen=_LOOK)
            pipe.llen(queue)
        answers = pipe.execute()
    found = {
        job.job_id: place if place is not None else (length if length > _LOOK else None)
        for job, place, length in zip(waiting, answers[::2], answers[1::2], strict=True)
    }
    return [found.get(job.job_id) for job in jobs]
