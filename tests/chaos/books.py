"""The books after a storm: every accepted job has the end it must have, and nothing is left in the broker."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker_config import keys
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from producer import DecodeClient
from tests.chaos.storm_plan import Report
from tests.support.keys_left import stray_keys

#: Distinct latents; what each decodes to is known before the storm.
VARIANTS = 12


@dataclass(frozen=True, kw_only=True)
class Books:
    """What went in, and what must have become of it."""

    #: Job id → variant of its latents.
    accepted: Mapping[str, int]
    damaged: Set[str]
    deadly: Set[str]
    #: Variant → digest of its picture.
    expected: Mapping[int, str]

    def check(self, client: DecodeClient, report: Report) -> None:
        """Adds outcomes and problems to the report."""
        for job_id, variant in self.accepted.items():
            snapshot = client.store.snapshot(job_id)
            report.outcomes[str(snapshot.status)] += 1
            if job_id in self.damaged:
                report.problems += _unless_failed(snapshot, "blob_corrupt")
            elif job_id in self.deadly:
                report.problems += _unless_failed(snapshot, "worker_crashed")
            elif snapshot.status is not JobStatus.SUCCEEDED:
                report.problems.append(f"{job_id} is {snapshot.status}: {snapshot.errors}")
            else:
                data = client.job(job_id).artifacts()[0][1]
                if digest(data) != self.expected[variant]:
                    report.problems.append(f"{job_id}: the artifact differs from the undisturbed one")
        _check_keys(client, report)


def _unless_failed(snapshot: JobSnapshot, code: str) -> list[str]:
    codes = [str(error.get("code")) for error in snapshot.errors]
    if snapshot.status is JobStatus.FAILED and code in codes:
        return []
    return [f"poison job {snapshot.job_id} is {snapshot.status} with {codes}, expected failed, {code}"]


def _check_keys(client: DecodeClient, report: Report) -> None:
    admin: Any = client.store.connections.commands
    report.problems += [f"stray key {key}" for key in stray_keys(admin)]
    totals = {name: int(value) for name, value in admin.hgetall(keys.TOTALS).items()}
    if any(totals.values()):
        report.problems.append(f"totals are not zero: {totals}")
    if admin.zcard(keys.LEASES):
        report.problems.append(f"leases left: {admin.zrange(keys.LEASES, 0, -1)}")
    queue = keys.queue_name("sd", "normal")
    if admin.llen(keys.rq_queue(queue)):
        report.problems.append("ids left in the queue")
    for registry, state in (("finished", "succeeded"), ("failed", "failed")):
        count = admin.zcard(f"{keys.RQ_PREFIX}{registry}:{queue}")
        extra = VARIANTS if state == "succeeded" else 0
        if count != report.outcomes[state] + extra:
            report.problems.append(f"RQ's {registry} registry has {count}, not {report.outcomes[state] + extra}")
    if admin.zcard(f"{keys.RQ_PREFIX}wip:{queue}"):
        report.problems.append("RQ's started registry is not empty")


def suspicious_lines(folder: Path) -> list[str]:
    """Log lines that should not be there, whatever was killed."""
    found = []
    for path in folder.glob("*.log"):
        lines = path.read_text(errors="replace").splitlines()
        for number, line in enumerate(lines):
            if '"stage_broke"' in line:
                found.append(f"{path.name}: {line[:2000]}")
            elif line.startswith("Traceback"):
                found.append(f"{path.name}: " + "\n".join(lines[number : number + 40]))
    return found[:10]


def digest(data: bytes) -> str:
    """Of an artifact."""
    return hashlib.sha256(data).hexdigest()
