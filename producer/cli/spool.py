"""`latentq spool`: see what waits for the broker, and hand it over."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from broker_config.connection import connect
from broker_config.errors import ConfigurationError
from broker_config.settings import load_settings
from producer.cli.tables import show
from producer.client import DecodeClient
from producer.quantities import counted, duration
from producer.spool import Spool, SpoolEntry
from producer.spool_flush import flush as hand_over

_spool = typer.Typer(help="Submits that wait for the broker on this machine.", no_args_is_help=True)

Folder = Annotated[
    Path | None, typer.Option("--folder", metavar="DIR", help="The spool. Without: LATENTQ_SPOOL_DIR's.")
]


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    app.add_typer(_spool, name="spool")


@_spool.command(name="list")
def list_spool(
    folder: Folder = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List what waits, oldest first, and what was set aside."""
    spool = Spool(_folder(folder))
    found = [*spool.entries(), *spool.aside()]
    if as_json:
        typer.echo(json.dumps([_plain(entry) for entry in found], indent=2))
        return
    if not found:
        typer.echo(f"nothing waits in {spool.folder}", err=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", "bytes", "age", "state"):
        table.add_column(heading, overflow="fold")
    for entry in found:
        age = duration(max(0.0, time.time() - entry.kept_s))
        state = f"set aside: {entry.reason}" if entry.aside else "waits"
        table.add_row(entry.job_id, str(entry.size_bytes), age, state)
    show(table)


@_spool.command()
def flush(folder: Folder = None) -> None:
    """Hand over what waits. Safe to repeat. Exit status 1 if something is left or was set aside."""
    spool, settings = Spool(_folder(folder)), load_settings()
    # a client with a spool of its own would hand over in the background, and this would count the rest
    with DecodeClient(connect(settings, name="latentq-client"), settings=settings) as client:
        report = hand_over(spool, store=client.store, blobs=client.blobs)
    left = len(spool.entries())
    for job_id in report.sent:
        typer.echo(job_id)
    for path, reason in report.aside:
        typer.echo(f"set aside: {path}: {reason}", err=True)
    for path in report.newer:
        typer.echo(f"left for a newer latentq: {path}", err=True)
    if report.stopped_by is not None:
        typer.echo(f"{report.stopped_by.message} [{report.stopped_by.code}]", err=True)
    typer.echo(f"{counted(len(report.sent), 'job')} handed over, {left} left", err=True)
    if left or report.aside:
        raise typer.Exit(1)


def _folder(folder: Path | None) -> Path:
    chosen = folder or load_settings().spool_dir
    if chosen is None:
        raise ConfigurationError("there is no spool: set LATENTQ_SPOOL_DIR, or give --folder")
    return chosen


def _plain(entry: SpoolEntry) -> dict[str, Any]:
    return {
        "job_id": entry.job_id,
        "path": str(entry.path),
        "size_bytes": entry.size_bytes,
        "kept_s": entry.kept_s,
        "aside": entry.aside,
        "reason": entry.reason,
    }
