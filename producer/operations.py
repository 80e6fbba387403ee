"""What an operator does with a running queue: pause, drain, purge, and try failed jobs again."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from broker_config import keys
from broker_config.errors import InvalidJob, InvalidOption, JobConflict, JobNotFound, ResultExpired, WaitTimeout
from broker_config.job_list import JobList, JobRow
from broker_config.keys import Priority
from broker_config.messages import DecodeRequest
from broker_config.queue_control import Purged, QueueControl
from broker_config.queue_report import QueueReport, QueueState
from producer.client import DecodeClient

_RETRY = re.compile(r"(?P<base>.+)-r(?P<number>\d{1,4})")
#: `-r` and four digits fit behind it in a job id of 64 characters.
_LONGEST_BASE: Final = 58
_POLL_S: Final = 0.5


class RequeueOutcome(StrEnum):
    """What came of a failed job."""

    #: A new job with its latents waits now.
    QUEUED = "queued"
    #: An earlier call made that job.
    ALREADY = "already there"
    #: Its latents are gone.
    EXPIRED = "latents are gone"
    #: The catalogue or the limits here no longer allow the job.
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True, slots=True)
class Requeued:
    """A failed job and the new job that tries again."""

    failed_id: str
    #: Derived from `failed_id`, so that there is one, however often it is asked for.
    new_id: str
    outcome: RequeueOutcome
    #: Why it was refused.
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainState:
    """What is left of the VAEs that are being drained."""

    #: Jobs that wait and will be taken.
    queued: int
    processing: int
    #: Jobs that wait and are not waited for: their VAE is paused.
    held_back: int
    #: VAEs with jobs that wait and no live worker.
    unserved: tuple[str, ...]

    @property
    def done(self) -> bool:
        """Whether nothing is left that would still be decoded."""
        return self.queued == 0 and self.processing == 0


class Operations:
    """The operating commands, for the CLI and the gateway."""

    def __init__(self, client: DecodeClient) -> None:
        self._client = client
        connections = client.store.connections
        self._control = QueueControl(connections)
        #: The queues and workers as they stand.
        self.report = QueueReport(connections)
        #: The jobs there are.
        self.jobs = JobList(connections)

    def pause(self, vae: str) -> bool:
        """Workers take no more jobs of `vae`; submits go on. Returns whether that is new.

        Raises:
            UnknownVae: neither in the catalogue nor a queue.
        """
        self._check_vae(vae)
        return self._control.pause(vae)

    def resume(self, vae: str) -> bool:
        """Workers take jobs of `vae` again. Returns whether it was paused.

        Raises:
            UnknownVae: neither paused, nor in the catalogue, nor a queue.
        """
        changed = self._control.resume(vae)
        if not changed:
            self._check_vae(vae)
        return changed

    def drain(
        self, vae: str | None = None, *, timeout_s: float | None = None, poll_s: float = _POLL_S
    ) -> Iterator[DrainState]:
        """Waits until nothing is queued or processing; yields what is left whenever that changed, the end included.

        Jobs of a paused VAE stay queued and are not waited for: `pause`, then `drain`, empties the workers.

        Args:
            vae: one VAE; None: all.
            timeout_s: how long to wait; None: without bound.
            poll_s: pause between two looks.

        Raises:
            UnknownVae: neither in the catalogue nor a queue.
            WaitTimeout: jobs are left; they go on.
        """
        if vae is not None:
            self._check_vae(vae)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        last = None
        while True:
            state = _drain_state(self.report.queues(vae))
            if state != last:
                yield state
            if state.done:
                return
            last = state
            left = poll_s if deadline is None else min(poll_s, deadline - time.monotonic())
            if left <= 0:
                left_over = f"{state.queued} jobs are queued and {state.processing} processing"
                raise WaitTimeout(f"{left_over} after {timeout_s:g} s; they go on")
            time.sleep(left)

    def queue_names(self, name: str) -> list[str]:
        """RQ's names of the queues that `name` means: `sdxl` (all three), `sdxl.low` or `latentq.sdxl.low`.

        Raises:
            UnknownVae: neither in the catalogue nor a queue.
            InvalidOption: no such priority.
        """
        vae, dot, priority = name.removeprefix(keys.QUEUE_PREFIX).partition(".")
        self._check_vae(vae)
        if not dot:
            return keys.queue_names(vae)
        if priority not in set(Priority):
            raise InvalidOption(
                f"{name!r} names no queue: a queue is VAE.high, VAE.normal or VAE.low, as `latentq queues` lists them",
                field="queue",
            )
        return [keys.queue_name(vae, priority)]

    def waiting(self, queues: list[str]) -> dict[str, list[str]]:
        """Ids that wait in these queues (RQ's names), by queue: what `purge` takes."""
        return self._control.waiting(queues)

    def purge(self, waiting: dict[str, list[str]]) -> Purged:
        """Cancels those of these jobs that still wait. What is processing goes on, also if it was taken just now."""
        return self._control.purge(waiting)

    def requeue_failed(
        self, *, vae: str | None = None, code: str | None = None, limit: int | None = None
    ) -> Iterator[Requeued]:
        """Makes a new job of each failed job's retained latents; those whose retention ends first come first.

        Safe to repeat: the new id follows from the failed one. A new job that failed, too, is tried again like any.

        Args:
            vae: of this VAE only.
            code: only those whose last attempt ended with this error code.
            limit: how many new jobs to make.

        Raises:
            UnknownVae: `vae` is neither in the catalogue nor a queue.
            QueueFull: what was yielded was made; the rest can be made later.
        """
        if vae is not None:
            self._check_vae(vae)
        made = 0
        for row in self.jobs.failed(vae):
            if limit is not None and made >= limit:
                return
            if code is None or row.error_code == code:
                requeued = self._requeue(row)
                made += requeued.outcome is RequeueOutcome.QUEUED
                yield requeued

    def _requeue(self, row: JobRow) -> Requeued:
        new_id = self._free_or_own(row.job_id)
        outcome, reason = RequeueOutcome.QUEUED, None
        try:
            if self.jobs.rows([new_id]):
                outcome = RequeueOutcome.ALREADY
            else:
                # An explicit timeout is part of the job; redecode would work out a new one.
                options: dict[str, Any] = {} if row.request is None else {"timeout_s": self._timeout_of(row.request)}
                self._client.redecode(row.job_id, job_id=new_id, **options)
        except (JobNotFound, ResultExpired):
            outcome = RequeueOutcome.EXPIRED
        except (InvalidJob, JobConflict) as error:
            outcome, reason = RequeueOutcome.REFUSED, error.message
        return Requeued(failed_id=row.job_id, new_id=new_id, outcome=outcome, reason=reason)

    def _timeout_of(self, request: DecodeRequest) -> float:
        """The timeout of a job that is tried again; the smallest one may have been raised since it was submitted."""
        return max(request.timeout_s, self._client.store.settings.timeout_min_s)

    def _free_or_own(self, failed_id: str) -> str:
        """The id of the job that tries `failed_id` again; not one that a caller gave to latents of another job."""
        new_id = retry_id(failed_id)
        rows = self.jobs.rows([new_id])
        # Of a tombstone nobody knows any more what it decoded: taken for ours, so that there is no second job.
        if rows and rows[0].request is not None and rows[0].request.source_job_id != failed_id:
            digest = hashlib.sha256(failed_id.encode()).hexdigest()[:16]
            return f"{failed_id[: _LONGEST_BASE - 17]}-{digest}-r1"
        return new_id

    def _check_vae(self, vae: str) -> None:
        if vae not in self._client.catalog and not self.report.queues(vae):
            self._client.catalog[vae]  # raises, and lists those there are


def retry_id(job_id: str) -> str:
    """The id of the job that tries a failed one again: `<id>-r1`, then `<id>-r2`; hashed where that is too long.

    >>> retry_id("cat")
    'cat-r1'
    >>> retry_id("cat-r1")
    'cat-r2'
    """
    match = _RETRY.fullmatch(job_id)
    base, number = (match["base"], int(match["number"]) + 1) if match else (job_id, 1)
    if len(base) > _LONGEST_BASE:
        base = f"{base[: _LONGEST_BASE - 17]}-{hashlib.sha256(base.encode()).hexdigest()[:16]}"
    return f"{base}-r{number}"


def _drain_state(queues: list[QueueState]) -> DrainState:
    def waiting(queue: QueueState) -> int:
        return queue.queued + queue.parked

    return DrainState(
        queued=sum(waiting(queue) for queue in queues if not queue.paused),
        processing=sum(queue.processing for queue in queues),
        held_back=sum(waiting(queue) for queue in queues if queue.paused),
        unserved=tuple(
            sorted({queue.vae for queue in queues if waiting(queue) and not queue.workers and not queue.paused})
        ),
    )
