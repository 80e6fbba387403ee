"""Errors of settings, catalogue and environment."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class ConfigurationError(LatentqError, code="configuration_invalid"):
    """The configuration is not usable."""


class CatalogInvalid(ConfigurationError, code="catalog_invalid"):
    """The VAE catalogue has an entry that cannot be used."""


class BrokerBinaryMissing(ConfigurationError, code="broker_binary_missing"):
    """No broker binary: install `latentq[local]`, put `redis-server` on PATH, or set LATENTQ_REDIS_URL."""


class BrokerNotRunning(ConfigurationError, code="broker_not_running", retryable=True):
    """No broker is running: start one with `latentq up`, or set LATENTQ_REDIS_URL."""


class WorkerNameTaken(ConfigurationError, code="worker_name_taken", retryable=True):
    """A worker of this name is alive, or was until just now: choose another LATENTQ_WORKER_NAME, or wait."""


class BrokerUnsupported(ConfigurationError, code="broker_unsupported"):
    """The broker is too old or is configured to evict keys."""
