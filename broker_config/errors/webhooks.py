"""Errors of webhooks."""

from __future__ import annotations

from broker_config.errors.base import LatentqError
from broker_config.errors.refusals import InvalidJob


class WebhooksNotConfigured(InvalidJob):
    """Webhooks need LATENTQ_PUBLIC_URL and LATENTQ_LINK_KEY, for the links in their messages."""

    code = "webhooks_not_configured"


class WebhookSecretMissing(InvalidJob):
    """There is no secret to sign the webhook with: give webhook_secret, or make one: `latentq webhooks secrets add`."""

    code = "webhook_secret_missing"


class DeliveryNotFound(LatentqError):
    """No such delivery: the id is wrong, or it is no longer kept."""

    code = "delivery_not_found"
