"""Errors of the prompt farm."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class DenoiseFailed(LatentqError, code="denoise_failed"):
    """The pipeline raised on a prompt; the other prompts go on."""
