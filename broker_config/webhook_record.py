"""What a job's record says of its webhook: everything the scripts need to enter a delivery (`scripts/outbox.lua`)."""

from __future__ import annotations

import json
from typing import Final

from broker_config.messages import DecodeRequest
from broker_config.receiver_url import ReceiverUrl
from broker_config.settings import Settings
from broker_config.webhook_secrets import UNUSED_S, owner_of
from broker_config.webhooks import BRIEF_GIVE_UP_S, GIVE_UP_S

#: Room a delivery may take in the broker, its entries and attempts included, besides three times its URL (in the record
#: and twice in the delivery): measured 1.6 kB with no attempt, 3.4 kB with the eight of the schedule.
_DELIVERY_BYTES: Final = 4096


def record_of(request: DecodeRequest, settings: Settings, *, own_secrets: bool) -> str:
    """The record's field `webhook`.

    Args:
        request: a job with a webhook.
        settings: how long dead letters stay, and how many.
        own_secrets: whether it brings secrets of its own.
    """
    assert request.webhook is not None
    receiver = ReceiverUrl.parse(request.webhook.url)
    return json.dumps(
        {
            "url": request.webhook.url,
            "receiver": receiver.origin,
            "endpoint": receiver.endpoint,
            "events": {str(event): True for event in request.webhook.events},
            "inline": request.webhook.inline,
            "signer": owner_of(request.job_id, own=own_secrets),
            "most": settings.webhook_max_pending,
            "give_up_ms": round(GIVE_UP_S * 1000),
            "brief_ms": round(BRIEF_GIVE_UP_S * 1000),
            "dead_ms": round(settings.webhook_dead_letter_s * 1000),
            "secret_ms": round(UNUSED_S * 1000),
        },
        separators=(",", ":"),
    )


def webhook_limits(request: DecodeRequest, settings: Settings) -> dict[str, object]:
    """What admission asks of the outbox (`scripts/prelude.lua`, `refusal`); nothing without a webhook."""
    if request.webhook is None:
        return {}
    return {"webhooks": settings.webhook_max_pending, "receiver": ReceiverUrl.parse(request.webhook.url).origin}


def outbox_bytes(request: DecodeRequest) -> int:
    """Room in the broker that is kept free for the delivery of the job's end."""
    return 0 if request.webhook is None else _DELIVERY_BYTES + 3 * len(request.webhook.url)
