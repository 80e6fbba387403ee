"""How hard a storm blows, and what it is found to have done."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

#: Queued → running, while a worker is idle.
PICKUP_BAR_S = 1.0
#: kill → queued again may take this much longer than the lease (docs/states.md).
REQUEUE_SLACK_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How hard it blows."""

    seed: int
    jobs: int
    #: SIGKILLs of workers, janitors and broker, at least.
    kills: int
    #: Jobs whose latents are damaged in the store.
    damaged: int
    #: Jobs whose decode kills the worker.
    deadly: int
    #: Jobs that each kill their worker while another is idle, after the storm: how fast does it take over?
    takeovers: int = 1
    lease_s: float = 3.0
    #: Longest time the whole may take.
    bound_s: float = 900.0


@dataclass
class Report:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    rq_info_runs: int = 0
    submit_retries: int = 0
    seconds: float = 0.0
    #: Seconds from a worker's SIGKILL to its jobs being queued again, while broker and janitors were left alone.
    requeue_s: list[float] = field(default_factory=list)
    #: The same where broker or janitor died within that time.
    requeue_disturbed_s: list[float] = field(default_factory=list)
    #: Seconds from queued to running while a worker was idle: fresh jobs, and jobs whose worker had died.
    pickup_s: list[float] = field(default_factory=list)
    takeover_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
