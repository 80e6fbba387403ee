"""Check of the store of large blobs: does it lie where this host looks for it, and is it the broker's?"""

from __future__ import annotations

from dataclasses import dataclass

from broker_config.connection import Connections
from broker_config.errors import BlobStoreUnavailable, ConfigurationError
from broker_config.external_index import ExternalIndex
from broker_config.settings import Settings
from broker_config.tiered_blob_store import store_at


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreState:
    """The store of large blobs, as this host and as the broker see it."""

    #: Where this host's settings point; None: all blobs lie in the broker.
    url: str | None
    #: The id that lies there; None: none.
    found_id: str | None
    #: Id and URL of the broker's store; None: it has none.
    registered: tuple[str, str] | None
    #: Why it could not be looked at.
    fault: str | None


def look_at_store(connections: Connections, settings: Settings) -> StoreState:
    """Compares ids. Unlike a worker's start it makes no store where there is none yet.

    Raises:
        BrokerError: the broker does not answer.
    """
    registered = ExternalIndex(connections).registered()
    url, found_id, fault = settings.blob_store, None, None
    try:
        store = store_at(settings)
        if store is not None:
            url = store.url
            try:
                found_id = store.read_id()
            finally:
                store.close()
    except (BlobStoreUnavailable, ConfigurationError) as error:
        fault = error.message
    return StoreState(url=url, found_id=found_id, registered=registered, fault=fault)
