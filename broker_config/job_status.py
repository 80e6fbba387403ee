"""The states of a job, and which follows which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class JobStatus(StrEnum):
    """Where a job is."""

    #: Accepted; waits for a worker (for the first time, or again).
    QUEUED = "queued"
    #: A worker holds its lease.
    PROCESSING = "processing"
    #: Its artifacts are stored.
    SUCCEEDED = "succeeded"
    #: Every attempt it was allowed ended with an error; its latents are retained.
    FAILED = "failed"
    #: Someone canceled it before it finished.
    CANCELED = "canceled"
    #: Its retention ended: latents and artifacts are gone, the id is remembered.
    EXPIRED = "expired"

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended (each end is announced once)."""
        return self not in (JobStatus.QUEUED, JobStatus.PROCESSING)


#: Which state follows which, and by whose doing. Tested against the drawing in docs/states.md.
TRANSITIONS: Final[Mapping[JobStatus, frozenset[JobStatus]]] = {
    JobStatus.QUEUED: frozenset({JobStatus.PROCESSING, JobStatus.CANCELED, JobStatus.FAILED, JobStatus.SUCCEEDED}),
    JobStatus.PROCESSING: frozenset({JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED}),
    JobStatus.SUCCEEDED: frozenset({JobStatus.EXPIRED}),
    JobStatus.FAILED: frozenset({JobStatus.EXPIRED}),
    JobStatus.CANCELED: frozenset({JobStatus.EXPIRED}),
    JobStatus.EXPIRED: frozenset(),
}
