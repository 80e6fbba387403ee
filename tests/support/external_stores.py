"""Looking at a store outside the broker."""

from __future__ import annotations

from broker_config.external_store import ExternalStore


def names_in(store: ExternalStore) -> set[str]:
    """Names of the blobs in a store."""
    return {blob.name for blob in store.listing()}
