"""A delivery as the broker has it and people see it: one event on its way to a receiver, with every attempt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from broker_config.scoped_ids import key_of
from broker_config.webhook_outbox import Attempt
from broker_config.webhooks import WebhookEvent


class DeliveryState(StrEnum):
    """Where a delivery is."""

    #: Waits for its next attempt.
    PENDING = "pending"
    #: A courier has it.
    SENDING = "sending"
    #: The receiver said 2xx. Kept for an hour.
    DELIVERED = "delivered"
    #: Given up; kept as a dead letter.
    DEAD = "dead"
    #: Given up; it was best effort. Kept for an hour.
    DROPPED = "dropped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One event on its way to a receiver, with every attempt."""

    #: The `webhook-id`.
    id: str
    #: The broker's id of the job; empty for a ping.
    job_id: str
    event: WebhookEvent
    state: DeliveryState
    #: Where it goes; path and query may hold the receiver's own secrets, so only who submitted the job may see it.
    url: str
    #: Scheme, host and port.
    receiver: str
    #: Scheme, host, port and path.
    endpoint: str
    #: Why it was given up; empty: it was not.
    reason: str
    #: Milliseconds since the epoch by the broker's clock; 0: not (yet).
    at_ms: int
    due_ms: int
    ended_ms: int
    #: Since it was entered or sent again by hand.
    tries: int
    #: The last fifty, oldest first.
    attempts: tuple[Attempt, ...]

    @property
    def key_id(self) -> str | None:
        """The gateway's key it belongs to; None: to none."""
        return key_of_delivery(self.id)


@dataclass(frozen=True, kw_only=True, slots=True)
class DeliveryPage:
    """Some deliveries."""

    deliveries: tuple[Delivery, ...]
    #: Where the next page begins; None: there are no more.
    cursor: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookCounts:
    """The outbox in numbers, for metrics and the doctor."""

    #: On their way: they wait, or a courier has them.
    pending: int
    #: Webhooks of jobs that have not ended.
    reserved: int
    dead_letters: int
    stopped_endpoints: int
    #: Live couriers.
    couriers: int
    #: For how long the oldest delivery that could be tried now waits for a courier; None: none waits.
    overdue_s: float | None
    #: Since the broker's data began: how deliveries ended.
    delivered: int
    dead: int
    dropped: int
    #: The same: how attempts ended.
    attempts_good: int
    attempts_bad: int


def delivery_id(job_id: str, event: WebhookEvent) -> str:
    """The `webhook-id` of a job's event; of `progress` it goes on with what was done by then."""
    return f"msg_{job_id}_{event}"


def key_of_delivery(delivery: str) -> str | None:
    """The gateway's key that a delivery belongs to; None: to none."""
    return key_of(delivery.removeprefix("msg_"))


def delivery_of(item: str, fields: Mapping[str, str]) -> Delivery:
    """The delivery in the fields of its hash."""

    def number(name: str) -> int:
        return int(float(fields.get(name) or 0))

    return Delivery(
        id=item,
        job_id=fields["job"],
        event=WebhookEvent(fields["event"]),
        state=DeliveryState(fields["state"]),
        url=fields["url"],
        receiver=fields["receiver"],
        endpoint=fields["endpoint"],
        reason=fields.get("reason", ""),
        at_ms=number("at_ms"),
        due_ms=number("due_ms"),
        ended_ms=number("ended_ms"),
        tries=number("tries"),
        attempts=tuple(_attempt(entry) for entry in json.loads(fields.get("log") or "[]")),
    )


def _attempt(entry: Mapping[str, Any]) -> Attempt:
    status = entry.get("status")
    return Attempt(
        at_ms=int(entry["at_ms"]),
        status=None if status is None else int(status),
        duration_ms=int(entry["duration_ms"]),
        error=str(entry["error"]),
    )
