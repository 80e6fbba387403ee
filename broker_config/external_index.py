"""What the broker knows of blobs outside it: which store is its own, what lies there, and until when.

DESIGN. A file has no TTL, and its deletion is no part of a script. So the broker holds an entry for every external
blob, from before its first byte is written until after it is deleted, and a blob's way is one direction::

      reserve            own, settle               doom               forget
    (nothing) ──► external: ms or inf ──► doomed ──► deleted in the store ──► (nothing)

1. `reserve` enters a name that was never used, with the time at which it lapses unless a job owns it by then.
   Only after that the client writes the blob.
2. `submit` and `complete` take ownership of a name only while it is in `external`, in the script that accepts the
   job; owners move its score like a TTL (`scripts/prelude.lua`, `settle`): inf while a live job owns it, then the
   end of the last owner's retention, 0 without owners.
3. `doom` moves what is past its score to `doomed`, in one script. From there nothing leads back.
4. The janitor deletes what is in `doomed`, then takes it off that list.

Why no interleaving loses an accepted job's blob: a blob is deleted only after it was in `doomed`; it gets there only
from `external` with a score that has passed, which a live job's `inf` never has; and `submit` finds no name in
`external` any more once it was doomed. So a job is accepted and its blob is doomed in one order or the other: in the
first, `doom` sees `inf`; in the second, `submit` answers `blob_missing` and the client writes the blob again, *under
another name*. That the name is another matters: a deletion that was decided may reach the store at any later time
(its janitor was stopped, its request is still in the network), and with the name used again it would hit the new
blob. `reserve` is safe to send again for the same reason: it carries the time of its lapse, and once that has passed,
which it must have before anything could doom the name, it is refused. No clock but the broker's is asked.

Why nothing is left for ever: whatever was written has an entry that ends, and an entry leaves `doomed` only once its
blob is deleted. What can still be left (a write that came through after its entry had lapsed, a broker that lost its
data) is in no list, so nobody can own it: the janitor's walk through the store dooms it, whatever its age; it waits
a while only so that a wrong clock or a restored backup can be noticed first.

Deletion waits `settle_s` after `doom`, so that a broker that comes back with its last second lost (`everysec`, or a
failover) does not find jobs whose blobs are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import uuid4

from broker_config import keys
from broker_config.answers import time_ms
from broker_config.connection import Connections, broker_errors
from broker_config.errors import BlobStoreUnavailable
from broker_config.scripts import source

#: What stands before the URL of a store that is set up (scripts/register_store.lua).
_READY: Final = b"ready "


@dataclass(frozen=True, kw_only=True, slots=True)
class Registration:
    """What came of showing a store to the broker."""

    #: ours: it is the broker's. create: the broker has none yet, make one with this id. other: the broker's store is
    #: another one, namely this. foreign: the broker has none, and what is there was not made for it.
    word: Literal["ours", "create", "other", "foreign"]
    store_id: str = ""
    url: str = ""


class ExternalIndex:
    """The broker's side of an external store."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._scripts: dict[str, Any] = {}

    def _run(self, name: str, *args: str | int) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self._connections.commands.register_script(source(name))
        with broker_errors(self._connections.url):
            return script(args=args)

    # The store ------------------------------------------------------------------------------------------

    def register(self, *, url: str, found: str | None) -> Registration:
        """Shows the broker the store at `url` with the id that was `found` there (None: none). Safe to repeat.

        A broker has one store. Of several processes that set up at one moment, the first whose id is found becomes
        it: ids that were given out to be created count only when they come back.
        """
        answer = [part.decode() for part in self._run("register_store", url, found or "", uuid4().hex)]
        return Registration(word=answer[0], store_id=answer[1], url=answer[2])

    def registered(self) -> tuple[str, str] | None:
        """Id and URL of the broker's store; None: it has none."""
        with broker_errors(self._connections.url):
            known = self._connections.commands.hgetall(keys.STORES)
        for store_id, entry in known.items():
            assert isinstance(store_id, bytes)
            assert isinstance(entry, bytes)
            if entry.startswith(_READY):
                return store_id.decode(), entry.removeprefix(_READY).decode()
        return None

    # Blobs ----------------------------------------------------------------------------------------------

    def reserve(self, store_id: str, name: str, *, lifetime_s: float) -> None:
        """Enters a new name that is about to be written, and that lapses unless a job owns it within `lifetime_s`.

        Raises:
            BlobStoreUnavailable: the broker does not know this store (any more), or answered too late.
        """
        with broker_errors(self._connections.url):
            lapse_ms = time_ms(self._connections.commands.time()) + round(lifetime_s * 1000)
        word = self._run("reserve", store_id, name, lapse_ms).decode()
        if word == "unknown":
            raise BlobStoreUnavailable(
                f"the broker at {self._connections.url} does not know blob store {store_id} any more: it lost its "
                "data, or was told to use another store; start this process again"
            )
        if word == "late":
            raise BlobStoreUnavailable(f"the broker at {self._connections.url} answered too late to store a blob")

    def doomed(self, store_id: str, *, settle_s: float, limit: int) -> list[str]:
        """Dooms what is past its time; returns what may be deleted now.

        Args:
            store_id: whose blobs.
            settle_s: how long a doomed blob still lies there.
            limit: names at a time.
        """
        return [name.decode() for name in self._run("doom", store_id, round(settle_s * 1000), limit)]

    def doom_strays(self, store_id: str, names: Sequence[str]) -> int:
        """Dooms those of these names, which a listing of the store has shown, that are on no list. Returns how many."""
        return int(self._run("doom_strays", store_id, *names))

    def forget(self, store_id: str, names: Sequence[str]) -> None:
        """Takes names off the list of the doomed: nothing lies under them any more."""
        with broker_errors(self._connections.url):
            self._connections.commands.zrem(keys.doomed(store_id), *names)

    def postpone(self, store_id: str, name: str, *, delay_s: float) -> None:
        """Puts a doomed blob that could not be deleted behind the others."""
        self._run("postpone", store_id, name, round(delay_s * 1000))
