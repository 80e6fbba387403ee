"""Errors about one job that exists, existed, or never did."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class JobError(LatentqError, code="job_error"):
    """The job is not in the state that was asked for."""


class JobNotFound(JobError, code="job_not_found"):
    """No such job: the id is wrong, or its tombstone is gone too."""


class JobSpooled(JobError, code="job_spooled", retryable=True):
    """The job waits in the spool of this machine; the broker does not have it yet."""


class JobConflict(JobError, code="job_conflict"):
    """This job id was already used for other latents or options; use a new id."""


class JobNotFinished(JobError, code="job_not_finished", retryable=True):
    """The job has not finished yet."""


class WaitTimeout(JobError, TimeoutError, code="wait_timeout", retryable=True):
    """The job did not finish in the time given; it goes on."""


class JobFailed(JobError, code="job_failed"):
    """The job failed; its latents are retained and can be decoded again."""

    def __init__(self, message: str | None = None, /, *, job_id: str | None = None, error_code: str = "error") -> None:
        super().__init__(message, job_id=job_id)
        #: Code of the error that ended the last attempt.
        self.error_code = error_code


class JobCanceled(JobError, code="job_canceled"):
    """The job was canceled."""


class ResultExpired(JobError, code="result_expired"):
    """The retention of this job's result has ended; submit the latents again."""


class WrongOutput(JobError, code="wrong_output"):
    """The job's output is of another kind than the one asked for."""
