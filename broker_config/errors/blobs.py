"""Errors about stored bytes."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class BlobError(LatentqError, code="blob_error"):
    """A blob could not be read."""


class BlobMissing(BlobError, code="blob_missing"):
    """The blob is gone: its retention ended or its store was replaced."""


class BlobStoreUnknown(BlobMissing, code="blob_store_unknown"):
    """The blob lies in the broker's store of large blobs, which this process does not use: set LATENTQ_BLOB_STORE."""


class BlobCorrupt(BlobError, code="blob_corrupt"):
    """The blob's bytes do not match their sha256."""
