"""The options `webhook…` of a job, checked: where to, which events, what travels along, signed with what."""

from __future__ import annotations

from collections.abc import Sequence

from broker_config.errors import InvalidOption, WebhooksNotConfigured
from broker_config.settings import Settings
from broker_config.url_guard import UrlGuard
from broker_config.webhook_secrets import read_secrets
from broker_config.webhooks import JOB_EVENTS, MIN_RETENTION_S, TERMINAL_EVENTS, Webhook, WebhookEvent, in_order
from producer.decode_options import DecodeOptions

#: What belongs to `webhook`.
_PARTS = ("webhook_events", "webhook_inline", "webhook_secret")


def checked_webhook(options: DecodeOptions, settings: Settings) -> Webhook | None:
    """The job's webhook; None: it has none.

    Raises:
        WebhooksNotConfigured: the settings that links need are missing.
        WebhookUrlRefused: the URL may not be called.
        InvalidOption: an unknown event, or an option without `webhook`.
    """
    if options.webhook is None:
        given = [name for name in _PARTS if getattr(options, name) not in (None, False)]
        if given:
            raise InvalidOption(f"{given[0]} is given without webhook: give the URL, too", field=given[0])
        return None
    if settings.public_url is None or not settings.link_keys:
        raise WebhooksNotConfigured(field="webhook")
    if not isinstance(options.webhook_inline, bool):
        raise InvalidOption(
            f"webhook_inline is {options.webhook_inline!r:.80}, expected True or False", field="webhook_inline"
        )
    url = UrlGuard.of(settings).check_url(options.webhook)
    return Webhook(url=str(url), events=_events(options.webhook_events), inline=options.webhook_inline)


def own_secrets(options: DecodeOptions) -> tuple[str, ...]:
    """What the job brings to sign its webhooks with; empty: nothing.

    Raises:
        InvalidOption: it is no secret.
    """
    return () if options.webhook_secret is None else read_secrets(options.webhook_secret)


def retention_with_webhook(asked_s: float | None, webhook: Webhook | None, settings: Settings) -> float:
    """How long the job's result stays: what a delivery links to must be there after its last attempt.

    Raises:
        InvalidOption: asked for less.
    """
    if webhook is None:
        return asked_s or settings.retention_s
    if asked_s is not None and asked_s < MIN_RETENTION_S:
        raise InvalidOption(
            f"retention_s is {asked_s:g}, but a job with a webhook keeps its result for at least {MIN_RETENTION_S:g} "
            "s, so that the last attempt to deliver links to something: give more, or leave it out",
            field="retention_s",
        )
    return asked_s or max(settings.retention_s, MIN_RETENTION_S)


def _events(asked: Sequence[str] | None) -> tuple[WebhookEvent, ...]:
    if asked is None:
        return TERMINAL_EVENTS
    names = asked.split(",") if isinstance(asked, str) else asked
    known = {str(event): event for event in JOB_EVENTS}
    wrong = [name for name in names if not isinstance(name, str) or name.strip() not in known]
    if wrong or not names:
        raise InvalidOption(
            f"webhook_events has {str(wrong[0])[:40]!r}, expected some of {', '.join(JOB_EVENTS)}"
            if wrong
            else f"webhook_events is empty: name some of {', '.join(JOB_EVENTS)}, or leave it out",
            field="webhook_events",
        )
    return in_order(known[name.strip()] for name in names)
