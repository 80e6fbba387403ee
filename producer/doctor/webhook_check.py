"""The check of the outbox: is what waits delivered, and has something been given up?"""

from __future__ import annotations

from typing import Final

from producer.doctor.finding import Finding, Observations, ok, problem, warning
from producer.quantities import counted, duration

#: A courier looks twice a second; with every slot taken by receivers that hang it may be their timeout.
_SLOW_S: Final = 60.0


def webhooks(seen: Observations) -> Finding:
    """Every end of a job with a webhook is told, if a courier runs."""
    counts = seen.webhooks
    waiting = f"{counted(counts.pending, 'webhook')} on the way"
    if counts.couriers == 0 and (counts.pending or counts.reserved):
        expected = f"{waiting}, {counts.reserved} of unfinished jobs to come"
        return problem("webhooks", f"no courier runs: {expected}", fix="start one: `latentq courier`")
    if counts.overdue_s is not None and counts.overdue_s > _SLOW_S:
        return warning(
            "webhooks",
            f"{waiting}, the oldest for {duration(counts.overdue_s)} without being tried",
            fix="look at the couriers' logs, and start another one: `latentq courier`",
        )
    if counts.dead_letters:
        stopped = f", {counted(counts.stopped_endpoints, 'endpoint')} answered 410" if counts.stopped_endpoints else ""
        return warning(
            "webhooks",
            f"{counted(counts.dead_letters, 'dead letter')}{stopped}",
            fix="`latentq webhooks list` says why; `latentq webhooks redeliver` sends them again",
        )
    return ok("webhooks", f"{waiting}, {counted(counts.couriers, 'courier')}")
