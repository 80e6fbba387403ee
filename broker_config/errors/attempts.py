"""Attempts that failed in a worker."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class WorkerError(LatentqError):
    """The attempt failed in the worker."""

    code = "worker_error"
    retryable = True


class WeightsMissing(WorkerError):
    """The worker has no weights for this VAE; check `weights` and `subfolder` in the catalogue."""

    code = "weights_missing"
    retryable = False


class WeightsMismatch(WorkerError):
    """The weights are not of the class or shape the catalogue names."""

    code = "weights_mismatch"
    retryable = False


class DecodeFailed(WorkerError):
    """The VAE raised while decoding."""

    code = "decode_failed"


class NonFiniteOutput(WorkerError):
    """The decoded tensor contains NaN or Inf in every dtype that was tried."""

    code = "output_not_finite"
    retryable = False


class OutOfMemory(WorkerError):
    """The device has too little memory for this decode."""

    code = "out_of_memory"


class EncodeFailed(WorkerError):
    """The decoded pictures could not be encoded."""

    code = "encode_failed"


class UnsupportedMessage(WorkerError):
    """The worker does not know this kind of job."""

    code = "unsupported_message"
    retryable = False


class StartDeadlinePassed(WorkerError):
    """No worker started the job within start_within_s."""

    code = "start_deadline_passed"
    retryable = False


class JobTimedOut(WorkerError):
    """An attempt exceeded timeout_s."""

    code = "job_timed_out"


class WorkerCrashed(WorkerError):
    """The worker process died while this job was on the device, as often as crashes are allowed."""

    code = "worker_crashed"
    retryable = False
