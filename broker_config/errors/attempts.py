"""Attempts that failed in a worker."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class WorkerError(LatentqError, code="worker_error", retryable=True):
    """The attempt failed in the worker."""


class WeightsMissing(WorkerError, code="weights_missing", retryable=False):
    """The worker has no weights for this VAE; check `weights` and `subfolder` in the catalogue."""


class WeightsMismatch(WorkerError, code="weights_mismatch", retryable=False):
    """The weights are not of the class or shape the catalogue names."""


class DecodeFailed(WorkerError, code="decode_failed"):
    """The VAE raised while decoding."""


class NonFiniteOutput(WorkerError, code="output_not_finite", retryable=False):
    """The decoded tensor contains NaN or Inf in every dtype that was tried."""


class OutOfMemory(WorkerError, code="out_of_memory"):
    """The device has too little memory for this decode."""


class EncodeFailed(WorkerError, code="encode_failed"):
    """The decoded pictures could not be encoded."""


class OutputTooLarge(WorkerError, code="output_too_large", retryable=False):
    """One output has more bytes than the broker holds in a value: choose another output, or set LATENTQ_BLOB_STORE."""


class UnsupportedMessage(WorkerError, code="unsupported_message", retryable=False):
    """The worker does not know this kind of job."""


class StartDeadlinePassed(WorkerError, code="start_deadline_passed", retryable=False):
    """No worker started the job within start_within_s."""


class JobTimedOut(WorkerError, code="job_timed_out"):
    """An attempt exceeded timeout_s."""


class WorkerCrashed(WorkerError, code="worker_crashed", retryable=False):
    """The worker process died while this job was on the device, as often as crashes are allowed."""
