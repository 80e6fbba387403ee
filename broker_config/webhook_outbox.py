"""The courier's side of the outbox: deliveries are taken under a lease, and what became of each attempt is told.

Every call is one atomic script that is safe to send again, like those of `job_store.py`: a claim carries a token, and
what is said of an attempt is fenced by it. A courier may be killed between any two calls: what it held is due again
when its lease ends, under the same id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, Literal

from broker_config import keys
from broker_config.answers import text
from broker_config.connection import BELL_BLOCK_S, Connections, broker_errors
from broker_config.scripts import source
from broker_config.settings import Settings
from broker_config.webhooks import WebhookEvent

#: Deliveries whose time is over, looked after at a time.
_BURY: Final = 200


class Settled(StrEnum):
    """What an attempt came to."""

    DELIVERED = "delivered"
    #: It will be tried again.
    AGAIN = "again"
    #: It was given up, and is listed.
    DEAD = "dead"
    #: It was given up, and is forgotten: it was best effort.
    DROPPED = "dropped"
    #: This attempt said so before; nothing changed.
    ALREADY = "already"
    #: The lease had ended, and another courier has it.
    LOST = "lost"
    #: There is no such delivery any more.
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try to deliver, as it is stored and shown."""

    #: By the broker's clock.
    at_ms: int
    #: HTTP status; None: there was no answer.
    status: int | None
    duration_ms: int
    #: Empty: it went well. Never the receiver's own words.
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DueDelivery:
    """A delivery that a courier holds."""

    #: The `webhook-id`: of one event, whatever the attempt.
    id: str
    #: Of the claim; every later word carries it.
    token: str
    #: Empty for a ping.
    job_id: str
    event: WebhookEvent
    url: str
    receiver: str
    #: Whose secrets sign it.
    signer: str
    inline: bool
    #: When the event happened, and the claim, by the broker's clock.
    at_ms: int
    claimed_ms: int
    #: Attempts before this one, since it was entered or sent again by hand.
    tries: int
    progress_done: int
    progress_total: int


class WebhookOutbox:
    """The deliveries of one broker, for couriers and the janitor."""

    def __init__(
        self, connections: Connections, settings: Settings, *, ahead_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Args:
        connections: to the broker.
        settings: how long dead letters stay, and how many.
        ahead_s: by how much the clock is ahead of the broker's; for tests that cannot wait for a day.
        """
        self.connections = connections
        self._settings = settings
        self._ahead_s = ahead_s
        self._scripts: dict[str, Any] = {}

    def _run(self, name: str, *args: str | int) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self.connections.commands.register_script(source(name))
        with broker_errors(self.connections.url):
            return script(args=[*args, round(self._ahead_s() * 1000)])

    @property
    def _dead_ms(self) -> int:
        return round(self._settings.webhook_dead_letter_s * 1000)

    def claim(
        self, *, token: str, courier: str, lease_s: float, most: int, most_per_receiver: int, alive_s: float
    ) -> list[DueDelivery]:
        """Takes deliveries that are due, a few for each receiver. The same token gets the same answer.

        Args:
            token: new for each claim.
            courier: who asks.
            lease_s: after which they are due again, unless `settle` was called.
            most: how many.
            most_per_receiver: how many may be under way to one receiver, whoever has them.
            alive_s: for how long the courier counts as alive.
        """
        now, *rows = self._run(
            "deliver",
            token,
            courier,
            round(lease_s * 1000),
            most,
            most_per_receiver,
            round(alive_s * 1000),
            self._dead_ms,
            self._settings.webhook_max_pending,
        )
        return [_due(text(row[0]), _pairs(row[1]), token=token, claimed_ms=int(now)) for row in rows]

    def settle(
        self,
        due: DueDelivery,
        attempt: Attempt,
        *,
        word: Literal["delivered", "failed", "stopped"],
        pause_s: float | None = None,
        answered: bool | None,
    ) -> Settled:
        """Tells what became of an attempt.

        Args:
            due: what was tried.
            attempt: how it went.
            word: `stopped`: the endpoint is gone for good.
            pause_s: until the next attempt, if it failed; None: there is none.
            answered: whether the receiver answered, whatever it said; None: it was not asked.
        """
        word_of = self._run(
            "settle",
            due.id,
            due.token,
            word,
            json.dumps(asdict(attempt)),
            "" if pause_s is None else round(pause_s * 1000),
            "" if answered is None else int(answered),
            self._dead_ms,
            self._settings.webhook_max_pending,
        )
        return Settled(text(word_of))

    def bury(self) -> list[str]:
        """Gives up deliveries whose time is over, tried or not. Returns their ids."""
        return [text(item) for item in self._run("bury", self._dead_ms, self._settings.webhook_max_pending, _BURY)]

    def leave(self, courier: str) -> None:
        """Says that a courier stops; what it still held is due when its lease ends."""
        with broker_errors(self.connections.url):
            self.connections.commands.zrem(keys.COURIERS, courier)

    def wait_for_work(self, *, timeout_s: float = BELL_BLOCK_S) -> bool:
        """Blocks until something is entered, or for a second at most. Returns whether it was."""
        with broker_errors(self.connections.url):
            rung = self.connections.bell.blpop([keys.COURIER_BELL], timeout=min(timeout_s, BELL_BLOCK_S))
        return rung is not None


def _pairs(flat: Sequence[bytes] | Mapping[bytes, bytes]) -> dict[str, str]:
    pairs = flat.items() if isinstance(flat, Mapping) else zip(flat[::2], flat[1::2], strict=True)
    return {text(name): text(value) for name, value in pairs}


def _due(delivery_id: str, fields: Mapping[str, str], *, token: str, claimed_ms: int) -> DueDelivery:
    return DueDelivery(
        id=delivery_id,
        token=token,
        job_id=fields["job"],
        event=WebhookEvent(fields["event"]),
        url=fields["url"],
        receiver=fields["receiver"],
        signer=fields["signer"],
        inline=fields["inline"] == "1",
        at_ms=int(fields["at_ms"]),
        claimed_ms=claimed_ms,
        tries=int(fields["tries"]),
        progress_done=int(fields["done"]),
        progress_total=int(fields["total"]),
    )
