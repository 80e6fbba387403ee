"""Webhooks: what a job asks for, which events there are, and the schedule on which they are delivered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Self


class WebhookEvent(StrEnum):
    """What can be delivered. The type of a message is `job.<event>`."""

    #: The job was accepted. Best effort.
    QUEUED = "queued"
    #: A worker took it for the first time. Best effort.
    PROCESSING = "processing"
    #: Pictures or frames are decoded; twice a second at most. Best effort.
    PROGRESS = "progress"
    #: Its artifacts are stored. Guaranteed.
    SUCCEEDED = "succeeded"
    #: Every attempt ended with an error. Guaranteed.
    FAILED = "failed"
    #: Someone canceled it. Guaranteed.
    CANCELED = "canceled"
    #: Nothing happened: `latentq webhooks ping` asks whether the receiver answers. No option of a job.
    PING = "ping"

    @property
    def is_terminal(self) -> bool:
        """Whether it is delivered on the whole schedule, and listed among the dead letters if that fails."""
        return self in TERMINAL_EVENTS

    @property
    def message_type(self) -> str:
        """`type` of its message."""
        return str(self) if self is WebhookEvent.PING else f"job.{self}"


#: How a job can end; what is delivered if the job does not say.
TERMINAL_EVENTS: Final = (WebhookEvent.SUCCEEDED, WebhookEvent.FAILED, WebhookEvent.CANCELED)
#: What a job may ask for.
JOB_EVENTS: Final = tuple(event for event in WebhookEvent if event is not WebhookEvent.PING)

#: Pause before each attempt, in seconds; the first follows the event at once. Almost a day in all: a receiver that is
#: repaired on the next morning gets everything. As Standard Webhooks proposes, without its last days.
SCHEDULE_S: Final = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 21_600.0)
#: The same for events that are worth little once the next one has happened, and for a ping.
BRIEF_SCHEDULE_S: Final = (0.0, 5.0)
PING_SCHEDULE_S: Final = (0.0,)
#: A pause is longer by up to this share, so that what failed together is not tried together.
JITTER: Final = 0.1
#: Longest pause that a receiver's Retry-After can ask for.
MAX_RETRY_AFTER_S: Final = 3600.0
#: After this a delivery is given up, however few attempts there were: the schedule with jitter (26 h), with room for
#: Retry-After and for pauses of the receiver's circuit breaker.
GIVE_UP_S: Final = 30 * 3600.0
BRIEF_GIVE_UP_S: Final = 60.0
#: Least retention of a job with a webhook: who gets the last attempt has six hours to fetch what it links to.
MIN_RETENTION_S: Final = 36 * 3600.0
assert sum(SCHEDULE_S) * (1 + JITTER) < GIVE_UP_S < MIN_RETENTION_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """Where a job's events go. The secrets that sign them are no part of it (`webhook_secrets.py`)."""

    #: As `UrlGuard.check_url` wrote it.
    url: str
    #: Which events.
    events: tuple[WebhookEvent, ...] = TERMINAL_EVENTS
    #: Whether artifacts that are small enough travel in the message.
    inline: bool = False

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Self:
        """The webhook in a message; an event that only a newer producer knows is passed over."""
        known = tuple(WebhookEvent(event) for event in wire["events"] if event in set(JOB_EVENTS))
        return cls(url=str(wire["url"]), events=known, inline=bool(wire.get("inline", False)))


def schedule_of(event: WebhookEvent) -> tuple[float, ...]:
    """Pauses before each attempt to deliver this event, in seconds."""
    if event is WebhookEvent.PING:
        return PING_SCHEDULE_S
    return SCHEDULE_S if event.is_terminal else BRIEF_SCHEDULE_S


def pause_before_next_s(event: WebhookEvent, *, tries: int, jitter: float, retry_after_s: float | None) -> float | None:
    """Seconds until the next attempt; None: there is none.

    Args:
        event: what is delivered.
        tries: attempts so far, at least one.
        jitter: from 0 to 1.
        retry_after_s: what the receiver asked for.
    """
    pauses = schedule_of(event)
    if tries >= len(pauses):
        return None
    pause = pauses[tries] * (1 + JITTER * jitter)
    return max(pause, min(retry_after_s or 0.0, MAX_RETRY_AFTER_S))


def in_order(events: Iterable[WebhookEvent]) -> tuple[WebhookEvent, ...]:
    """These events, each once, in the order in which they happen."""
    asked = set(events)
    return tuple(event for event in JOB_EVENTS if event in asked)
