"""Every error latentq raises, as one tree.

::

    LatentqError
    ├── ConfigurationError            settings, catalogue or environment are wrong
    │   ├── CatalogInvalid
    │   ├── BrokerBinaryMissing       no server binary for the embedded broker
    │   ├── BrokerNotRunning          no embedded broker runs and no URL is set
    │   └── BrokerUnsupported         too old, or evicts keys
    ├── BrokerError                   the broker is configured, but does not serve us (retryable)
    │   ├── BrokerUnreachable
    │   ├── BrokerRefusesWrites       out of memory, disk full, read-only replica
    │   ├── BlobStoreUnavailable      the folder or bucket of large blobs does not do what it should
    │   └── QueueFull                 admission is closed; carries retry_after_s
    ├── InvalidJob                    refused before anything is allocated (never retryable)
    │   ├── UnknownVae · UnknownLayout · UnknownPipeline · InvalidOption
    │   ├── InvalidRank · InvalidChannels · InvalidDtype · InvalidSize · LatentsNotFinite
    │   ├── PixelLimitExceeded · LatentsTooLarge
    │   └── InvalidTensorFile         NotSafetensors · TensorFileTruncated · TensorFileOversized
    ├── JobError                      about one job that exists, existed, or never did
    │   ├── JobNotFound · JobConflict · JobNotFinished · WaitTimeout
    │   └── JobFailed · JobCanceled · ResultExpired · WrongOutput
    ├── BlobError                     BlobMissing · BlobStoreUnknown · BlobCorrupt
    ├── RequestError                  an HTTP request was refused by the gateway, whatever it asked for
    │   ├── BadRequest · RouteNotFound · MethodNotAllowed · MediaTypeUnsupported · RangeNotSatisfiable
    │   ├── NotAuthenticated · NotAllowed · WrongHost
    │   ├── LengthRequired · BodyTooLarge · QueryTooLong · UploadTooSlow
    │   ├── TryLater                  RateLimited · QuotaExceeded · GatewayBusy
    │   └── InternalError
    └── WorkerError                   an attempt failed in the worker
        ├── WeightsMissing · WeightsMismatch · DecodeFailed · NonFiniteOutput · OutOfMemory
        └── EncodeFailed · UnsupportedMessage · StartDeadlinePassed · JobTimedOut · WorkerCrashed

A leaf has a stable `code` (used on the wire, in logs and in docs/errors.md), says whether the same call can
succeed later (`retryable`), and its docstring is its default message. Messages name the field and the fix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar


class LatentqError(Exception):
    """latentq failed."""

    #: Stable identifier, also used on the wire.
    code: ClassVar[str] = "error"
    #: Whether the same call can succeed later without being changed.
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, /, *, field: str | None = None, job_id: str | None = None):
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])
        #: The option or argument at fault, where there is one.
        self.field = field
        #: The job concerned, where there is one.
        self.job_id = job_id

    @property
    def message(self) -> str:
        """The sentence a person reads."""
        return str(self.args[0])

    def to_wire(self) -> dict[str, Any]:
        """`{"code", "message", "retryable", "field"?, "job_id"?}` as stored with a job and sent over HTTP."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message, "retryable": self.retryable}
        if self.field:
            wire["field"] = self.field
        if self.job_id:
            wire["job_id"] = self.job_id
        return wire


# Configuration ------------------------------------------------------------------------------------------


class ConfigurationError(LatentqError):
    """The configuration is not usable."""

    code = "configuration_invalid"


class CatalogInvalid(ConfigurationError):
    """The VAE catalogue has an entry that cannot be used."""

    code = "catalog_invalid"


class BrokerBinaryMissing(ConfigurationError):
    """No broker binary: install `latentq[local]`, put `redis-server` on PATH, or set LATENTQ_REDIS_URL."""

    code = "broker_binary_missing"


class BrokerNotRunning(ConfigurationError):
    """No broker is running: start one with `latentq up`, or set LATENTQ_REDIS_URL."""

    code = "broker_not_running"
    retryable = True


class BrokerUnsupported(ConfigurationError):
    """The broker is too old or is configured to evict keys."""

    code = "broker_unsupported"


# Broker -------------------------------------------------------------------------------------------------


class BrokerError(LatentqError):
    """The broker did not do what was asked."""

    code = "broker_error"
    retryable = True


class BrokerUnreachable(BrokerError):
    """The broker does not answer; check its address and that it runs."""

    code = "broker_unreachable"


class BrokerRefusesWrites(BrokerError):
    """The broker refuses writes (memory or disk is full, or it is a replica); nothing was stored."""

    code = "broker_refuses_writes"


class BlobStoreUnavailable(BrokerError):
    """The store of large blobs does not do what it should; check its folder or service."""

    code = "blob_store_unavailable"


class QueueFull(BrokerError):
    """The queue takes no more jobs for now; nothing was stored, submit again later."""

    code = "queue_full"

    def __init__(self, message: str | None = None, /, *, retry_after_s: float, job_id: str | None = None):
        super().__init__(message, job_id=job_id)
        #: When it is worth trying again, in seconds.
        self.retry_after_s = retry_after_s


# Refused at the door ------------------------------------------------------------------------------------


class InvalidJob(LatentqError, ValueError):
    """The job was refused; nothing was stored."""

    code = "invalid_job"


class UnknownVae(InvalidJob):
    """The catalogue has no such VAE; `latentq vaes` lists them."""

    code = "unknown_vae"


class UnknownLayout(InvalidJob):
    """The VAE does not take this latent layout."""

    code = "unknown_layout"


class UnknownPipeline(InvalidJob):
    """The pipeline's class is not in the table; give vae and layout instead."""

    code = "unknown_pipeline"


class InvalidOption(InvalidJob):
    """An option has a value that is not allowed."""

    code = "invalid_option"


class InvalidRank(InvalidJob):
    """The latents have the wrong number of dimensions for the layout."""

    code = "latents_rank"


class InvalidChannels(InvalidJob):
    """The latents have the wrong number of channels for the VAE."""

    code = "latents_channels"


class InvalidDtype(InvalidJob):
    """The latents' dtype is not one of float16, bfloat16, float32."""

    code = "latents_dtype"


class InvalidSize(InvalidJob):
    """height, width or num_frames do not fit the latents."""

    code = "latents_size"


class LatentsNotFinite(InvalidJob):
    """The latents contain NaN or Inf; the picture would be black. Check the denoiser's dtype."""

    code = "latents_not_finite"


class PixelLimitExceeded(InvalidJob):
    """The decoded picture would exceed the configured pixel limit."""

    code = "pixel_limit_exceeded"


class LatentsTooLarge(InvalidJob):
    """The latents exceed the size one job may have."""

    code = "latents_too_large"


class InvalidTensorFile(InvalidJob):
    """The file does not hold usable latents."""

    code = "tensor_file_invalid"


class NotSafetensors(InvalidTensorFile):
    """The file is not a safetensors file; save latents with `safetensors.torch.save_file`."""

    code = "tensor_file_not_safetensors"


class TensorFileTruncated(InvalidTensorFile):
    """The file ends before its header says so; copy it again."""

    code = "tensor_file_truncated"


class TensorFileOversized(InvalidTensorFile):
    """The file is longer than its header says, or its header is larger than allowed."""

    code = "tensor_file_oversized"


# One job ------------------------------------------------------------------------------------------------


class JobError(LatentqError):
    """The job is not in the state that was asked for."""

    code = "job_error"


class JobNotFound(JobError):
    """No such job: the id is wrong, or its tombstone is gone too."""

    code = "job_not_found"


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


# Blobs --------------------------------------------------------------------------------------------------


class BlobError(LatentqError):
    """A blob could not be read."""

    code = "blob_error"


class BlobMissing(BlobError):
    """The blob is gone: its retention ended or its store was replaced."""

    code = "blob_missing"


class BlobStoreUnknown(BlobMissing):
    """The blob lies in the broker's store of large blobs, which this process does not use: set LATENTQ_BLOB_STORE."""

    code = "blob_store_unknown"


class BlobCorrupt(BlobError):
    """The blob's bytes do not match their sha256."""

    code = "blob_corrupt"


# The gateway ---------------------------------------------------------------------------------------------


class RequestError(LatentqError):
    """The gateway refused the request."""

    code = "request_error"


class BadRequest(RequestError):
    """The request cannot be read."""

    code = "bad_request"


class RouteNotFound(RequestError):
    """The gateway has nothing at this path; /docs lists what there is."""

    code = "route_not_found"


class MethodNotAllowed(RequestError):
    """This path does not take this method; /docs lists what there is."""

    code = "method_not_allowed"


class MediaTypeUnsupported(RequestError):
    """The body is of a kind that is not taken here."""

    code = "media_type_unsupported"


class RangeNotSatisfiable(RequestError):
    """The range lies outside of the output."""

    code = "range_not_satisfiable"


class NotAuthenticated(RequestError):
    """No key was given, or it is unknown or revoked: send `Authorization: Bearer KEY`."""

    code = "not_authenticated"


class NotAllowed(RequestError):
    """The key may not do this, or the request comes from another site's page."""

    code = "not_allowed"


class WrongHost(RequestError):
    """The Host header is not one of this gateway's names: add it to LATENTQ_GATEWAY_ALLOWED_HOSTS."""

    code = "wrong_host"


class LengthRequired(RequestError):
    """The request does not say how long its body is: send Content-Length."""

    code = "length_required"


class BodyTooLarge(RequestError):
    """The body is larger than what is taken here."""

    code = "body_too_large"


class QueryTooLong(RequestError):
    """The query string is longer than what is taken here."""

    code = "query_too_long"


class UploadTooSlow(RequestError):
    """The body came too slowly."""

    code = "upload_too_slow"
    retryable = True


class TryLater(RequestError):
    """The same request may be taken later."""

    code = "try_later"
    retryable = True

    def __init__(self, message: str | None = None, /, *, retry_after_s: float) -> None:
        super().__init__(message)
        #: When it is worth trying again, in seconds.
        self.retry_after_s = retry_after_s


class RateLimited(TryLater):
    """The key asks more often than its rate allows."""

    code = "rate_limited"


class QuotaExceeded(TryLater):
    """The key has used up its jobs of the day."""

    code = "quota_exceeded"


class GatewayBusy(TryLater):
    """The gateway does as much as it may at a time; try again."""

    code = "gateway_busy"


class InternalError(RequestError):
    """The gateway met an error it does not know; its log has more."""

    code = "internal_error"
    retryable = True


# Worker -------------------------------------------------------------------------------------------------


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


def walk(root: type[LatentqError] = LatentqError) -> Iterator[type[LatentqError]]:
    """Every class of the tree, parents first (for the docs, and for the test that checks the codes)."""
    yield root
    for child in root.__subclasses__():
        yield from walk(child)
