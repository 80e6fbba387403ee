"""Errors of settings, catalogue and environment."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class ConfigurationError(LatentqError):
    """The configuration is not usable."""

    code = "configuration_invalid"


class CatalogInvalid(ConfigurationError):
    """The VAE catalogue has an entry that cannot be used."""

    code = "catalog_invalid"


class BrokerBinaryMissing(ConfigurationError):
    """No broker binary: install `latentq[local]`, put `redis-server` on PATH, or set LATENTQ_REDIS_URL."""

    code = "broker_binary_missing"


class BrokerNotRunning(ConfigurationError):
    """No broker is running: start one with `latentq up`, or set LATENTQ_REDIS_URL."""

    code = "broker_not_running"
    retryable = True


class BrokerUnsupported(ConfigurationError):
    """The broker is too old or is configured to evict keys."""

    code = "broker_unsupported"
