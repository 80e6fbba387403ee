"""Looking at the outbox, and operating it: what is on its way, dead letters, sending again, stopped endpoints.

Used by `latentq webhooks`, the gateway and the doctor. Nothing here has a secret, or anything a receiver has said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal
from uuid import uuid4

from broker_config import keys
from broker_config.answers import pipelined, text, time_ms
from broker_config.connection import Connections, broker_errors
from broker_config.delivery_record import (
    Delivery,
    DeliveryPage,
    DeliveryState,
    WebhookCounts,
    delivery_id,
    delivery_of,
    key_of_delivery,
)
from broker_config.errors import DeliveryNotFound, InvalidOption, QueueFull
from broker_config.receiver_url import ReceiverUrl
from broker_config.scoped_ids import scoped
from broker_config.scripts import source
from broker_config.settings import Settings
from broker_config.webhooks import BRIEF_GIVE_UP_S, GIVE_UP_S, JOB_EVENTS

__all__ = ["Delivery", "DeliveryPage", "DeliveryState", "WebhookCounts", "WebhookDeliveries", "delivery_id"]

#: Where a listing goes on: a time of the list, ms, and how many entries of that time were passed. No id, since whoever
#: asks may see only some; an entry of the very same millisecond that goes meanwhile shifts those behind it.
Place = tuple[int, int]

_CURSOR = re.compile(r"(\d{1,15})-(\d{1,6})")
#: Ids looked at in one round trip of a listing, and in all for one page: a filter that fits few must not read all.
_CHUNK: Final = 200
_LOOKED_AT: Final = 5000
#: Receivers that are asked how much waits for them: those that are left alone longest, being silent, come first.
_MOST_RECEIVERS: Final = 10_000
#: How long a ping is remembered.
_PING_S: Final = 3600.0


class WebhookDeliveries:
    """The deliveries of one broker, for people."""

    def __init__(self, connections: Connections, settings: Settings) -> None:
        self._connections = connections
        self._settings = settings

    # Looking --------------------------------------------------------------------------------------------

    def show(self, delivery_id: str) -> Delivery:
        """One delivery, with every attempt.

        Raises:
            DeliveryNotFound: the id is wrong, or it is no longer kept.
        """
        found = self._read([delivery_id])
        if not found:
            raise DeliveryNotFound(
                f"no delivery {delivery_id[:120]!r}: the id is wrong, or it is no longer kept (an hour, once delivered)"
            )
        return found[0]

    def of_job(self, job_id: str) -> list[Delivery]:
        """What is still kept of a job's deliveries, by event; `progress` only where it is pending."""
        ids = [delivery_id(job_id, event) for event in JOB_EVENTS]
        return self._read(ids)

    def page(
        self,
        which: Literal["dead", "pending"] = "dead",
        *,
        limit: int = 50,
        after: str | None = None,
        key_id: str | None = None,
    ) -> DeliveryPage:
        """Dead letters, the last one first; or what is on its way, what is given up next first.

        Args:
            which: of the two.
            limit: how many.
            after: `cursor` of the page before.
            key_id: only of jobs that came in with this gateway's key; None: of all.

        Raises:
            InvalidOption: `after` is no cursor.
        """
        place = None if after is None else _place(after)
        found: list[tuple[Delivery, Place]] = []
        for _ in range(_LOOKED_AT // _CHUNK):
            entries = self._entries(which, after=place)
            wanted = {item: at for item, at in entries if key_id is None or key_of_delivery(item) == key_id}
            found += [(delivery, wanted[delivery.id]) for delivery in self._read(wanted)]
            if len(found) > limit:
                return _page(found[:limit], until=found[limit - 1][1])
            if len(entries) < _CHUNK:
                return _page(found, until=None)
            place = entries[-1][1]
        return _page(found, until=place)

    def stopped(self) -> dict[str, int]:
        """Endpoints that answered 410, with when (ms), the last one first. Nothing is sent there."""
        with broker_errors(self._connections.url):
            raw: Any = self._connections.commands.zrange(keys.STOPPED, 0, -1, desc=True, withscores=True)
        return {text(endpoint): int(score) for endpoint, score in raw}

    def counts(self) -> WebhookCounts:
        """The outbox in numbers."""
        with pipelined(self._connections) as pipe:
            pipe.time()
            (now,) = pipe.execute()
            now_ms = time_ms(now)
            pipe.zcard(keys.OUTBOX)
            pipe.hget(keys.TOTALS, "webhooks")
            pipe.zcount(keys.DEAD_LETTERS, now_ms, "+inf")
            pipe.zcard(keys.STOPPED)
            pipe.zcount(keys.COURIERS, now_ms, "+inf")
            pipe.zrange(keys.RECEIVERS, 0, 0, withscores=True)
            pipe.hgetall(keys.WEBHOOK_COUNTS)
            pending, reserved, dead, stopped, couriers, first, counted = pipe.execute()
        ended = {text(name): int(value) for name, value in counted.items()}
        names = ("delivered", "dead", "dropped", "attempts_good", "attempts_bad")
        overdue_s = (now_ms - float(first[0][1])) / 1000 if first else 0.0
        return WebhookCounts(
            pending=pending,
            reserved=int(reserved or 0),
            dead_letters=dead,
            stopped_endpoints=stopped,
            couriers=couriers,
            overdue_s=overdue_s if overdue_s > 0 else None,
            **{name: ended.get(name, 0) for name in names},
        )

    def crowded(self, *, least: int) -> dict[str, int]:
        """Receivers (scheme, host, port) for which so many deliveries wait or more, with how many those are."""
        with broker_errors(self._connections.url):
            raw: Any = self._connections.commands.zrange(keys.RECEIVERS, 0, _MOST_RECEIVERS - 1, desc=True)
        receivers = [text(item) for item in raw]
        with pipelined(self._connections) as pipe:
            for receiver in receivers:
                pipe.zcard(keys.due(receiver))
            counts = pipe.execute()
        return {receiver: count for receiver, count in zip(receivers, counts, strict=True) if count >= least}

    # Operating ------------------------------------------------------------------------------------------

    def redeliver(self, delivery_id: str) -> bool:
        """Sends one again at once, under its id, with a whole new schedule. False: it is on its way already.

        Raises:
            DeliveryNotFound: the id is wrong, or it is no longer kept.
            QueueFull: the outbox is.
        """
        lives_s = GIVE_UP_S if self.show(delivery_id).event.is_terminal else BRIEF_GIVE_UP_S
        word = self._run(
            "redeliver",
            delivery_id,
            round(lives_s * 1000),
            round(self._settings.webhook_dead_letter_s * 1000),
            self._settings.webhook_max_pending,
            0,
        )
        if word == "unknown":
            raise DeliveryNotFound(f"no delivery {delivery_id[:120]!r}: it is no longer kept")
        if word == "full":
            raise QueueFull(
                f"{self._settings.webhook_max_pending} webhooks are pending (LATENTQ_WEBHOOK_MAX_PENDING)",
                retry_after_s=5.0,
            )
        return word == "queued"

    def ping(self, url: ReceiverUrl, *, signer: str, key_id: str | None = None) -> str:
        """Sends a message of type `ping` to a receiver, once; `show` says what became of it. Returns its id.

        Args:
            url: checked (`UrlGuard.check_url`).
            signer: whose secrets sign it (`webhook_secrets.owner_of_key`).
            key_id: the gateway's key that asks for it; None: none.
        """
        name = f"ping_{uuid4().hex}"
        ping_id = f"msg_{name if key_id is None else scoped(key_id, name)}"
        times = (round(BRIEF_GIVE_UP_S * 1000), round(_PING_S * 1000))
        self._run("ping", ping_id, url.origin, str(url), url.endpoint, signer, *times)
        return ping_id

    def enable(self, endpoint: str) -> bool:
        """Lets messages go to an endpoint that answered 410 once. Returns whether it was stopped.

        Args:
            endpoint: as `stopped` lists it, or a URL there; a query is passed over.
        """
        with broker_errors(self._connections.url):
            return bool(self._connections.commands.zrem(keys.STOPPED, ReceiverUrl.parse(endpoint).endpoint))

    # Inside ---------------------------------------------------------------------------------------------

    def _run(self, name: str, *args: str | int) -> str:
        with broker_errors(self._connections.url):
            answer: Any = self._connections.commands.register_script(source(name))(args=args)
        return answer.decode() if isinstance(answer, bytes) else str(answer)

    def _entries(self, which: Literal["dead", "pending"], *, after: Place | None) -> list[tuple[str, Place]]:
        """The next ids of a listing, and the place of each."""
        score, passed = after or (None, 0)
        name, first, last = (keys.DEAD_LETTERS, "+inf", "-inf") if which == "dead" else (keys.OUTBOX, "-inf", "+inf")
        with broker_errors(self._connections.url):
            raw: Any = self._connections.commands.zrange(
                name, first if score is None else score, last, desc=which == "dead", byscore=True, offset=passed,
                num=_CHUNK, withscores=True,
            )  # fmt: skip
        entries = []
        for item, at in raw:
            passed = passed + 1 if int(at) == score else 1
            score = int(at)
            entries.append((text(item), (score, passed)))
        return entries

    def _read(self, ids: Iterable[str]) -> list[Delivery]:
        """Those of these deliveries that are kept."""
        asked = list(ids)
        if not asked:
            return []
        with pipelined(self._connections) as pipe:
            for item in asked:
                pipe.hgetall(keys.delivery(item))
            raw = pipe.execute()
        return [
            delivery_of(item, {text(name): text(value) for name, value in fields.items()})
            for item, fields in zip(asked, raw, strict=True)
            if b"state" in fields
        ]


def _page(found: Sequence[tuple[Delivery, Place]], *, until: Place | None) -> DeliveryPage:
    cursor = None if until is None else f"{until[0]}-{until[1]}"
    return DeliveryPage(deliveries=tuple(delivery for delivery, _ in found), cursor=cursor)


def _place(cursor: str) -> Place:
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidOption("cursor is none that a page had: leave it out to begin anew", field="cursor")
    return int(match[1]), int(match[2])
