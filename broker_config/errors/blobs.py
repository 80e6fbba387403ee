"""Errors about stored bytes."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


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
