"""Errors about one job that exists, existed, or never did."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class JobError(LatentqError):
    """The job is not in the state that was asked for."""

    code = "job_error"


class JobNotFound(JobError):
    """No such job: the id is wrong, or its tombstone is gone too."""

    code = "job_not_found"


class JobSpooled(JobError):
    """The job waits in the spool of this machine; the broker does not have it yet."""

    code = "job_spooled"
    retryable = True


class JobConflict(JobError):
    """This job id was already used for other latents or options; use a new id."""

    code = "job_conflict"


class JobNotFinished(JobError):
    """The job has not finished yet."""

    code = "job_not_finished"
    retryable = True


class WaitTimeout(JobError, TimeoutError):
    """The job did not finish in the time given; it goes on."""

    code = "wait_timeout"
    retryable = True


class JobFailed(JobError):
    """The job failed; its latents are retained and can be decoded again."""

    code = "job_failed"

    def __init__(self, message: str | None = None, /, *, job_id: str | None = None, error_code: str = "error") -> None:
        super().__init__(message, job_id=job_id)
        #: Code of the error that ended the last attempt.
        self.error_code = error_code


class JobCanceled(JobError):
    """The job was canceled."""

    code = "job_canceled"


class ResultExpired(JobError):
    """The retention of this job's result has ended; submit the latents again."""

    code = "result_expired"


class WrongOutput(JobError):
    """The job's output is of another kind than the one asked for."""

    code = "wrong_output"
