"""A courier without network: it takes what is due and says of each attempt what a test tells it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from broker_config.webhook_outbox import Attempt, WebhookOutbox

_tokens = itertools.count()


@dataclass(frozen=True)
class ToldCourier:
    """Settles deliveries as told; nothing that fails is tried again by itself."""

    outbox: WebhookOutbox

    def work(
        self, word: Literal["delivered", "failed", "stopped"] = "failed", *, status: int | None = 500
    ) -> list[str]:
        """Tries everything that is due. Returns the ids."""
        due = self.outbox.claim(
            token=f"told{next(_tokens)}", courier="told", lease_s=30, most=64, most_per_receiver=64, alive_s=30
        )
        for item in due:
            error = "" if word == "delivered" else f"status {status}"
            attempt = Attempt(at_ms=item.claimed_ms, status=status, duration_ms=12, error=error)
            self.outbox.settle(item, attempt, word=word, answered=True)
        return [item.id for item in due]
