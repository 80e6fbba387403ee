"""The broker, or a store of large blobs, does not serve us."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class BrokerError(LatentqError, code="broker_error", retryable=True):
    """The broker did not do what was asked."""


class BrokerUnreachable(BrokerError, code="broker_unreachable"):
    """The broker does not answer; check its address and that it runs."""


class BrokerRefusesWrites(BrokerError, code="broker_refuses_writes"):
    """The broker refuses writes (memory or disk is full, or it is a replica); nothing was stored."""


class BlobStoreUnavailable(BrokerError, code="blob_store_unavailable"):
    """The store of large blobs does not do what it should; check its folder or service."""


class SpoolUnavailable(BrokerError, code="spool_unavailable"):
    """The broker does not take the job, and the spool folder cannot keep it: free its disk."""


class QueueFull(BrokerError, code="queue_full"):
    """The queue takes no more jobs for now; nothing was stored, submit again later."""

    def __init__(self, message: str | None = None, /, *, retry_after_s: float, job_id: str | None = None):
        super().__init__(message, job_id=job_id)
        #: When it is worth trying again, in seconds.
        self.retry_after_s = retry_after_s
