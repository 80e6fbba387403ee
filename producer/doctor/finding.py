"""What the doctor looked at, and what it says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from broker_config.broker_facts import BrokerFacts
from broker_config.job_audit import JobAudit
from broker_config.queue_report import LeaseState, QueueState, Totals
from broker_config.settings import Settings
from broker_config.webhook_deliveries import WebhookCounts
from producer.doctor.store_check import StoreState


class Level(StrEnum):
    """How bad a finding is."""

    #: As it should be.
    OK = "ok"
    #: Works, but someone should know, or decide.
    WARNING = "warning"
    #: Jobs are lost, stuck or refused, or will be.
    PROBLEM = "problem"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found."""

    #: Name of the check, as docs/operating.md lists it.
    check: str
    level: Level
    #: What is the case.
    finding: str
    #: What to do about it; None where all is well.
    fix: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Observations:
    """Everything that was read from the broker; the checks are functions of this."""

    settings: Settings
    #: The broker's address, without user name and password.
    url: str
    facts: BrokerFacts
    queues: tuple[QueueState, ...]
    totals: Totals
    leases: LeaseState
    #: Whether RQ's own `rq suspend` holds every worker.
    suspended: bool
    store: StoreState
    webhooks: WebhookCounts
    #: Receivers for which much waits, with how many deliveries.
    crowded: Mapping[str, int]
    audit: JobAudit
    #: A job that waits longer than this is worth a look.
    long_wait_s: float


Check = Callable[[Observations], Finding]


def ok(check: str, finding: str) -> Finding:
    """All is well."""
    return Finding(check=check, level=Level.OK, finding=finding)


def warning(check: str, finding: str, *, fix: str) -> Finding:
    """Someone should know."""
    return Finding(check=check, level=Level.WARNING, finding=finding, fix=fix)


def problem(check: str, finding: str, *, fix: str) -> Finding:
    """Something is wrong."""
    return Finding(check=check, level=Level.PROBLEM, finding=finding, fix=fix)
