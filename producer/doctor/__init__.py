"""`latentq doctor`: is everything as it should be, and if not, what to do?

Reads once what there is to read (`Observations`), then asks each check. Changes nothing in the broker.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker_config.broker_facts import read_broker_facts
from broker_config.connection import Connections, connect
from broker_config.errors import BrokerError, ConfigurationError, LatentqError
from broker_config.job_audit import audit_jobs
from broker_config.queue_report import QueueReport
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog
from broker_config.webhook_deliveries import WebhookDeliveries
from producer.doctor.broker_checks import BROKER_CHECKS, NEARLY_FULL
from producer.doctor.finding import Finding, Level, Observations, ok, problem
from producer.doctor.job_checks import JOB_CHECKS
from producer.doctor.store_check import look_at_store
from producer.doctor.webhook_check import webhooks

__all__ = ["DEFAULT_LONG_WAIT_S", "DEFAULT_MAX_KEYS", "Diagnosis", "Finding", "Level", "diagnose"]

#: Ten minutes: longer than any single image takes on a slow worker.
DEFAULT_LONG_WAIT_S = 600.0
#: A walk over 60,000 took 5 s on two busy cores.
DEFAULT_MAX_KEYS = 100_000
#: A janitor ends a lease within a second of its end.
_LEASE_SLACK_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Every finding."""

    findings: tuple[Finding, ...]

    def count(self, level: Level) -> int:
        """Findings of this level."""
        return sum(item.level is level for item in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether there is no problem; warnings may be there."""
        return self.count(Level.PROBLEM) == 0


def diagnose(
    settings: Settings, *, long_wait_s: float = DEFAULT_LONG_WAIT_S, max_keys: int = DEFAULT_MAX_KEYS
) -> Diagnosis:
    """Examines the configured broker and what is in it.

    Args:
        settings: which broker, which limits, which catalogue.
        long_wait_s: a job of a served VAE that waits longer than this is worth a warning.
        max_keys: how many of the broker's keys are looked at for lost jobs, drifted totals and strays.
    """
    findings = [_catalogue(settings)]
    try:
        connections = connect(settings, name="latentq-doctor", retries=0)
    except (BrokerError, ConfigurationError) as error:
        return Diagnosis(findings=(*findings, _unreachable(error)))
    try:
        seen = observe(connections, settings, long_wait_s=long_wait_s, max_keys=max_keys)
    except BrokerError as error:
        return Diagnosis(findings=(*findings, _unreachable(error)))
    finally:
        connections.close()
    findings.append(ok("broker", f"{seen.url} answers"))
    return Diagnosis(findings=(*findings, *(check(seen) for check in (*BROKER_CHECKS, *JOB_CHECKS, webhooks))))


def observe(connections: Connections, settings: Settings, *, long_wait_s: float, max_keys: int) -> Observations:
    """Reads what the checks judge.

    Raises:
        BrokerError: the broker does not answer.
    """
    report = QueueReport(connections)
    deliveries = WebhookDeliveries(connections, settings)
    return Observations(
        settings=settings,
        url=connections.url,
        facts=read_broker_facts(connections),
        queues=tuple(report.queues()),
        totals=report.totals(),
        leases=report.leases(slack_s=_LEASE_SLACK_S),
        suspended=report.suspended(),
        store=look_at_store(connections, settings),
        webhooks=deliveries.counts(),
        crowded=deliveries.crowded(least=max(1, round(NEARLY_FULL * settings.webhook_max_pending / 4))),
        audit=audit_jobs(connections, max_keys=max_keys),
        long_wait_s=long_wait_s,
    )


def _catalogue(settings: Settings) -> Finding:
    try:
        catalog = VaeCatalog.load(settings.catalog)
    except ConfigurationError as error:
        return problem("catalogue", error.message, fix="mend the file, or unset LATENTQ_CATALOG")
    own = f", with {settings.catalog}" if settings.catalog else ""
    return ok("catalogue", f"{len(catalog)} VAEs{own}")


def _unreachable(error: LatentqError) -> Finding:
    # Messages of errors name the fix behind a colon.
    finding, colon, fix = error.message.rpartition(": ")
    fix = fix if colon else "`latentq up` starts one; otherwise check LATENTQ_REDIS_URL, network and disk"
    return problem("broker", f"{finding if colon else error.message}; nothing else was checked", fix=fix)
