"""Queues, workers, jobs and findings as tables that fit a terminal; into a pipe they go unfolded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from broker_config.job_list import JobRow
from broker_config.job_status import JobStatus
from broker_config.queue_report import QueueState, WorkerState
from producer.doctor import Diagnosis, Level
from producer.quantities import counted, duration

#: Wide enough that nothing is folded for grep and awk.
_PIPE_COLUMNS: Final = 400
#: From here on `jobs` shows more columns, and all.
_WIDE: Final = 100
_WIDEST: Final = 140
_LEVEL_STYLES: Final = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def show(table: Table) -> None:
    """Prints a table to standard output."""
    console = _console()
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        typer.echo(line.rstrip())


def queue_table(queues: Sequence[QueueState]) -> Table:
    """Depth, age and state of each queue."""
    table = _table("vae", "priority", "+queued", "+oldest", "+processing", "+failed", "+workers", "")
    for queue in queues:
        notes = ["paused"] if queue.paused else []
        if queue.queued and not queue.workers:
            notes.append("no worker")
        if queue.parked:
            notes.append(f"{queue.parked} parked")
        table.add_row(
            queue.vae,
            queue.priority,
            str(queue.queued),
            "" if queue.oldest_s is None else duration(queue.oldest_s),
            str(queue.processing),
            str(queue.failed),
            str(queue.workers),
            Text(", ".join(notes), style="yellow"),
        )
    return table


def worker_table(workers: Sequence[WorkerState]) -> Table:
    """What each live worker does."""
    table = _table("name", "VAEs", "device", "+busy", "+jobs", "+held", "+seen")
    for worker in workers:
        table.add_row(
            worker.name,
            ", ".join(worker.vaes),
            worker.device,
            "" if worker.busy_share is None else f"{worker.busy_share:.0%}",
            str(worker.jobs),
            str(worker.held),
            duration(worker.seen_s),
        )
    return table


def job_table(rows: Sequence[JobRow]) -> Table:
    """A line or two for each job; more columns where there is room. An id is never folded: it is there to be copied."""
    width = _console().width
    more = [] if width < _WIDE else ["priority", "what"] if width < _WIDEST else ["priority", "what", "+attempts", ""]
    table = _table("id", "status", "vae", "+age", *more)
    table.columns[0].min_width = max((len(row.job_id) for row in rows), default=0)
    for row in rows:
        note = _note(row)
        name = Text(row.job_id)
        if note and width < _WIDEST:
            name.append(f"\n  {note}", style="dim")
        cells = (row.priority, _what(row), str(row.attempts), note)
        table.add_row(name, row.status, row.vae, duration(row.age_s), *cells[: len(more)])
    return table


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """Each finding, and under it what to do."""
    table = Table.grid(padding=(0, 2))
    for finding in diagnosis.findings:
        style = _LEVEL_STYLES[finding.level]
        text = Text(finding.finding)
        if finding.fix:
            text.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(Text(finding.level, style=style), Text(finding.check, no_wrap=True), text)
    return table


def summary(diagnosis: Diagnosis) -> str:
    """`23 checks: 1 problem, 2 warnings`."""
    parts = [
        counted(diagnosis.count(level), level) for level in (Level.PROBLEM, Level.WARNING) if diagnosis.count(level)
    ]
    return f"{len(diagnosis.findings)} checks: {', '.join(parts) or 'all is well'}"


def _console() -> Console:
    fits = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False) if fits else Console(highlight=False, width=_PIPE_COLUMNS)


def _table(*headings: str) -> Table:
    """A table without lines; `+` before a heading: numbers, aligned right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        options: dict[str, Any] = {"justify": "right", "no_wrap": True} if heading.startswith("+") else {}
        table.add_column(heading.removeprefix("+"), overflow="fold", **options)
    return table


def _what(row: JobRow) -> str:
    if row.request is None:
        return ""
    frames = f"×{row.request.num_frames}" if row.request.num_frames > 1 else ""
    batch = f"{row.request.batch} × " if row.request.batch > 1 else ""
    return f"{batch}{row.request.width}×{row.request.height}{frames} {row.request.output}"


def _note(row: JobRow) -> str:
    if row.status is JobStatus.PROCESSING:
        return row.worker or ""
    if row.status in (JobStatus.FAILED, JobStatus.QUEUED):
        return row.error_code or ""
    return ""
