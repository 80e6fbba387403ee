"""Links to a job's outputs that need no key: of the bucket itself where it can make them, else of the gateway."""

from __future__ import annotations

from broker_config.errors import BlobStoreUnavailable, ConfigurationError
from broker_config.job_record import JobSnapshot
from broker_config.link_signing import LinkSigner
from broker_config.messages import BlobRef
from broker_config.settings import Settings
from broker_config.tiered_blob_store import TieredBlobStore


class OutputLinks:
    """Makes links for messages. Each lasts as long as what it leads to."""

    def __init__(self, settings: Settings, blobs: TieredBlobStore) -> None:
        """Args:
        settings: with `public_url` and `link_key`.
        blobs: knows the bucket, if there is one.

        Raises:
            ConfigurationError: there is no key to sign with.
        """
        self._signer = LinkSigner(settings.link_keys, settings.public_url or "")
        self._blobs = blobs

    def of(self, job: JobSnapshot, *, now_ms: int) -> list[str]:
        """A link to each output; none if the job has none (any more).

        Raises:
            BrokerUnreachable: the broker does not answer.
        """
        if job.result is None:
            return []
        ends_s = job.expires_ms // 1000
        lasts_s = max(1.0, ends_s - now_ms / 1000)
        return [
            self._in_bucket(artifact.blob, lasts_s=lasts_s)
            or self._signer.output_url(job.job_id, number, expires_s=ends_s)
            for number, artifact in enumerate(job.result.artifacts)
        ]

    def _in_bucket(self, blob: BlobRef, *, lasts_s: float) -> str | None:
        try:
            return self._blobs.link(blob, lifetime_s=lasts_s)
        except (BlobStoreUnavailable, ConfigurationError):  # the gateway's link works when the bucket does again
            return None
