"""What passes between a worker and the store of jobs: claims, renewals, and what an attempt's end came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Outcome(StrEnum):
    """What a worker's word about its attempt came to."""

    COMPLETED = "completed"
    #: This attempt said so before; nothing changed.
    ALREADY = "already"
    #: Another attempt has the job, or it ended otherwise; what we made is not needed.
    LOST = "lost"
    #: An artifact is no longer in the broker: store it again, then complete again.
    ARTIFACT_MISSING = "artifact_missing"
    RETRYING = "retrying"
    FAILED = "failed"
    #: Someone canceled the job meanwhile, so it is not tried again.
    CANCELED = "canceled"


class Claim(NamedTuple):
    """A job a worker holds."""

    job_id: str
    #: Identifies the attempt; every later word about it carries it.
    execution: str
    message: bytes
    #: RQ's own data field, which names the function.
    rq_data: bytes
    #: 1 for the first attempt.
    attempt: int
    crashes: int
    #: The latents' bytes, unchecked, where they are small and lie in the broker; None: they are to be fetched.
    latents: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reaped:
    """What a look at the leases came to."""

    #: Seconds until leases count again; 0: they count.
    grace_s: float
    #: Job id → requeued, crashed (queued again, counted), failed or canceled.
    jobs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewal:
    """What a worker says of one job when it renews the lease."""

    job_id: str
    execution: str
    #: claimed, ready, device, encode or finish; a worker that dies in `device` counts a crash.
    stage: str
    done: int = 0
    total: int = 0
    #: False: its stage is told, the lease only extended if less than half of it is left.
    extend: bool = True
