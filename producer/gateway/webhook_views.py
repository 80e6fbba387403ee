"""Deliveries of webhooks as the API shows them to one identity."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import quote

from broker_config import webhook_deliveries as outbox
from broker_config.webhook_deliveries import DeliveryState
from producer.gateway.identity import Identity
from producer.gateway.schemas import Delivery, DeliveryAttempt, DeliveryUrls


def delivery_url(name: str) -> str:
    """Path of a delivery."""
    return f"/v1/webhooks/{quote(name, safe='')}"


def show_delivery(found: outbox.Delivery, identity: Identity) -> Delivery:
    """One delivery."""
    url = delivery_url(found.id)
    own = identity.key is None or identity.key.id == found.key_id
    return Delivery(
        id=found.id,
        event=found.event,
        state=found.state,
        job_id=identity.shown(found.job_id) if found.job_id else None,
        receiver=found.receiver,
        url=found.url if own else None,
        reason=found.reason or None,
        created_at=time_of(found.at_ms),
        next_attempt_at=time_of(found.due_ms) if found.state is DeliveryState.PENDING else None,
        ended_at=time_of(found.ended_ms) if found.ended_ms else None,
        attempts=[
            DeliveryAttempt(
                at=time_of(attempt.at_ms),
                status=attempt.status,
                duration_ms=attempt.duration_ms,
                error=attempt.error or None,
            )
            for attempt in found.attempts
        ],
        urls=DeliveryUrls(self=url, redeliver=f"{url}/redeliver", enable=f"{url}/enable"),
    )


def owned_by(identity: Identity) -> str | None:
    """Id of the key whose deliveries a listing for this one has; None: everyone's."""
    return None if identity.sees_all or identity.key is None else identity.key.id


def time_of(ms: int) -> datetime:
    """A time of the broker's clock."""
    return datetime.fromtimestamp(ms / 1000, UTC)
