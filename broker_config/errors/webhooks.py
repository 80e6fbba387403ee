"""Errors of webhooks."""

from __future__ import annotations

from broker_config.errors.base import LatentqError
from broker_config.errors.refusals import InvalidJob


class WebhooksNotConfigured(InvalidJob, code="webhooks_not_configured"):
    """Webhooks need LATENTQ_PUBLIC_URL and LATENTQ_LINK_KEY, for the links in their messages."""


class WebhookSecretMissing(InvalidJob, code="webhook_secret_missing"):
    """There is no secret to sign the webhook with: give webhook_secret, or make one: `latentq webhooks secrets add`."""


class DeliveryNotFound(LatentqError, code="delivery_not_found"):
    """No such delivery: the id is wrong, or it is no longer kept."""
