"""Deletes blobs outside the broker that nobody needs any more. Runs in the janitor, without torch.

DESIGN. One thread beside the janitor's own, because a deletion may take as long as a network does and leases may not
wait for it; it works only while its janitor leads. What goes is decided by the broker alone (`scripts/doom.lua`);
`broker_config/external_index.py` has the argument why no interleaving with a submit loses a blob. Killed anywhere, it
leaves names on the list of the doomed, and the next one deletes them (again). The walk, once an hour, looks through
the whole store for what is on no list and for temporaries of dead writers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from itertools import islice
from typing import Final

from broker_config.errors import BlobStoreUnavailable, LatentqError
from broker_config.tiered_blob_store import OpenedStore, TieredBlobStore

logger = logging.getLogger(__name__)

#: A broker that comes back may have lost its last second, a replica that takes over a little more.
_SETTLE_S: Final = 10.0
#: What is on no list is nobody's at once; an hour leaves time to notice a wrong clock or a restored backup.
_STRAY_AGE_S: Final = 3600.0
_WALK_EVERY_S: Final = 3600.0
_PAUSE_S: Final = 1.0
#: Names in one script and one request.
_BATCH: Final = 200
#: A blob that could not be deleted is tried again after this time.
_POSTPONE_S: Final = 60.0
#: So many failures one after another are the store's fault, not a blob's.
_FAILURES: Final = 3


class BlobSweeper:
    """Works off what the broker has doomed."""

    def __init__(
        self, blobs: TieredBlobStore, *, settle_s: float = _SETTLE_S, stray_age_s: float = _STRAY_AGE_S
    ) -> None:
        """Args:
        blobs: the tiers; without an external one nothing is done.
        settle_s: how long a doomed blob still lies there.
        stray_age_s: age from which a blob that is on no list is doomed, and a temporary removed.
        """
        self._blobs = blobs
        self._settle_s = settle_s
        self._stray_age_s = stray_age_s
        self._walked_at = -_WALK_EVERY_S

    def run(self, stop: threading.Event, *, leads: Callable[[], bool]) -> None:
        """Sweeps until `stop` is set, while `leads()`; waits out a broker or a store that is away.

        A store that is not the broker's is logged again and again: leases, beside it, matter more than its deletions.
        """
        while not stop.is_set():
            try:
                if leads():
                    self._blobs.verify()
                    self.sweep()
                    if time.monotonic() - self._walked_at > _WALK_EVERY_S:
                        self.walk()
                        self._walked_at = time.monotonic()
            except Exception as error:  # a thread that ended unseen would let the store grow without bound
                logger.warning(
                    "blobs are not deleted for now: %s",
                    error,
                    exc_info=not isinstance(error, LatentqError),
                    extra={"action": "blob_sweep_failed"},
                )
                stop.wait(_POSTPONE_S)
            stop.wait(_PAUSE_S)

    def sweep(self) -> int:
        """Deletes what is due. Returns how many.

        Raises:
            BlobStoreUnavailable: the store does not delete; what is due stays on the list.
            BrokerUnreachable: the broker does not answer.
        """
        opened = self._blobs.external()
        if opened is None:
            return 0
        count = 0
        while names := self._blobs.index.doomed(opened.id, settle_s=self._settle_s, limit=_BATCH):
            deleted = self._delete(opened, names)
            if deleted:
                self._blobs.index.forget(opened.id, deleted)
            count += len(deleted)
        if count:
            logger.info("%d blobs deleted", count, extra={"action": "blobs_deleted", "count": count})
        return count

    def walk(self) -> int:
        """Looks through the store for what is on no list, dooms it, and removes old temporaries. Returns how many.

        Raises:
            BlobStoreUnavailable, BrokerUnreachable: it was not looked through to the end.
        """
        opened = self._blobs.external()
        if opened is None:
            return 0
        old = (blob.name for blob in opened.store.listing() if blob.age_s > self._stray_age_s)
        index, count = self._blobs.index, 0
        while names := list(islice(old, _BATCH)):
            count += index.doom_strays(opened.id, names)
        dropped = opened.store.drop_partial(older_than_s=self._stray_age_s)
        if count or dropped:
            logger.warning(
                "%d blobs on no list doomed, %d temporaries removed",
                count,
                dropped,
                extra={"action": "blobs_stray", "count": count, "dropped": dropped},
            )
        return count + dropped

    def _delete(self, opened: OpenedStore, names: list[str]) -> list[str]:
        """Those of `names` that are deleted; one that cannot be must not keep the others from it."""
        try:
            opened.store.delete(names)
            return names
        except BlobStoreUnavailable:
            deleted: list[str] = []
            failures = 0
            for name in names:
                try:
                    opened.store.delete([name])
                    deleted.append(name)
                    failures = 0
                except BlobStoreUnavailable as error:
                    logger.warning(
                        "blob %s is not deleted: %s", name, error, extra={"action": "blob_not_deleted", "blob": name}
                    )
                    self._blobs.index.postpone(opened.id, name, delay_s=_POSTPONE_S)
                    failures += 1
                    if failures == _FAILURES:
                        raise
            return deleted
