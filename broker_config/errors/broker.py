"""The broker, or a store of large blobs, does not serve us."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


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


class SpoolUnavailable(BrokerError):
    """The broker does not take the job, and the spool folder cannot keep it: free its disk."""

    code = "spool_unavailable"


class QueueFull(BrokerError):
    """The queue takes no more jobs for now; nothing was stored, submit again later."""

    code = "queue_full"

    def __init__(self, message: str | None = None, /, *, retry_after_s: float, job_id: str | None = None):
        super().__init__(message, job_id=job_id)
        #: When it is worth trying again, in seconds.
        self.retry_after_s = retry_after_s
