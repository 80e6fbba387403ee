"""Errors of the prompt farm."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class DenoiseFailed(LatentqError):
    """The pipeline raised on a prompt; the other prompts go on."""

    code = "denoise_failed"
