"""Commands about jobs: status, result, cancel, redecode, ack, and the list of VAEs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from broker_config.decode_result import Artifact
from broker_config.errors import InvalidOption, JobNotFinished
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog, VaeEntry
from producer.cli.job_options import (
    OptFps,
    OptId,
    OptMetadata,
    OptMode,
    OptOutput,
    OptRetention,
    OptScalingFactor,
    OptShiftFactor,
    OptStartWithin,
    OptTimeout,
    OptWait,
    OptWebhook,
    OptWebhookEvents,
    OptWebhookInline,
    OptWebhookSecret,
    after_submit,
    named_options,
)
from producer.cli.services import become
from producer.client import DecodeClient
from producer.pipelines import served_by
from producer.quantities import counted

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as `submit` printed it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_console = Console()


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    for command in (status, result, cancel, redecode, ack, vaes):
        app.command()(command)


def redecode(
    ctx: typer.Context,
    source_id: JobId,
    output: OptOutput = None,
    fps: OptFps = None,
    mode: OptMode = None,
    priority: Annotated[str | None, typer.Option(help="high, normal or low.")] = None,
    timeout_s: OptTimeout = None,
    start_within_s: OptStartWithin = None,
    retention_s: OptRetention = None,
    scaling_factor: OptScalingFactor = None,
    shift_factor: OptShiftFactor = None,
    metadata: OptMetadata = None,
    provenance: Annotated[bool | None, typer.Option("--provenance/--no-provenance", help="As `submit` has it.")] = None,
    preview: Annotated[bool | None, typer.Option("--preview", help="Show a preview by a small VAE first.")] = None,
    allow_tiling: Annotated[bool | None, typer.Option("--allow-tiling", help="As `submit` has it.")] = None,
    webhook: OptWebhook = None,
    webhook_events: OptWebhookEvents = None,
    webhook_inline: OptWebhookInline = False,
    webhook_secret: OptWebhookSecret = None,
    job_id: OptId = None,
    wait: OptWait = False,
) -> None:
    """Decode a job's retained latents again; what is not named stays as it was. Prints the new job's id."""
    with DecodeClient.from_env() as client:
        after_submit(client.redecode(source_id, **named_options(ctx)), wait=wait)


def status(job_id: JobId, as_json: AsJson = False) -> None:
    """Show where a job is."""
    with DecodeClient.from_env() as client:
        snapshot = client.job(job_id).snapshot()
    if as_json:
        typer.echo(json.dumps(_plain(snapshot), indent=2))
        return
    for name, value in describe(snapshot).items():
        _console.print(f"[dim]{name:>10}[/dim]  {value}", highlight=False, soft_wrap=True)


def result(
    job_id: JobId,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File, or folder for several artifacts.")
    ] = None,
    wait: Annotated[float | None, typer.Option(help="Wait up to this many seconds for the job.")] = None,
) -> None:
    """Store a finished job's artifacts; prints the files."""
    with DecodeClient.from_env() as client:
        job = client.job(job_id)
        if wait is not None:
            job.wait(timeout=wait)
        for path, data in _targets(job_id, job.artifacts(), output):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except OSError as error:
                raise InvalidOption(
                    f"{path} cannot be written: {error.strerror}; the broker still has it, name another place with -o",
                    field="output",
                ) from None
            typer.echo(path)


def cancel(job_id: JobId) -> None:
    """Cancel a job: at once while it waits, between two stages while it runs."""
    with DecodeClient.from_env() as client:
        now = client.job(job_id).cancel()
    typer.echo("cancel requested" if now is JobStatus.PROCESSING else now)


def ack(job_id: JobId) -> None:
    """Say that a result is safe elsewhere: its bytes are freed before their retention ends."""
    with DecodeClient.from_env() as client:
        client.job(job_id).ack()
    typer.echo("freed")


def vaes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show everything about one.")] = None,
    plan: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="Measure here how its decode would be run at this size."),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of the clip to plan, for VAEs of clips.")] = 1,
    as_json: AsJson = False,
) -> None:
    """List the VAEs of the catalogue."""
    if plan is not None:
        if name is None:
            raise InvalidOption("--plan needs the name of a VAE: latentq vaes NAME --plan 1024x1024", field="plan")
        options = ["--size", plan, "--frames", str(frames), *(["--json"] if as_json else [])]
        become("worker.plan", [name, *options])
    catalog = VaeCatalog.load(load_settings().catalog)
    chosen = [catalog[name]] if name else list(catalog.values())
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in chosen], indent=2))
    elif name:
        states = [str(chosen[0].state_of(layout)) for layout in chosen[0].layouts]
        facts = chosen[0].model_dump(mode="json") | {"state": states, "pipelines": served_by(name)}
        for field, value in facts.items():
            _console.print(f"[dim]{field:>14}[/dim]  {_cell(value)}", highlight=False, soft_wrap=True)
    else:
        _console.print(_vae_table(chosen))


def describe(snapshot: JobSnapshot) -> dict[str, str]:
    """A job in words, for a terminal."""
    lines = {"job": snapshot.job_id, "status": str(snapshot.status), "vae": snapshot.vae}
    if snapshot.status is JobStatus.QUEUED and not snapshot.served:
        lines["status"] = f"queued; no worker serves {snapshot.vae} now"
    if snapshot.cancel_requested:
        lines["status"] += "; cancel requested"
    if snapshot.request is not None:
        request = snapshot.request
        frames = f" × {request.num_frames} frames" if request.num_frames > 1 else ""
        lines["size"] = f"{request.batch} × {request.width} × {request.height}{frames} → {request.output}"
    if snapshot.progress_total and not snapshot.status.is_terminal:
        lines["progress"] = f"{snapshot.progress_done} of {snapshot.progress_total}"
    if snapshot.started_ms:
        lines["waited"] = f"{(snapshot.started_ms - snapshot.submitted_ms) / 1000:.3f} s"
    if snapshot.result is not None:
        times = snapshot.result.timings_s
        lines["times"] = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in times.items())
        lines["artifacts"] = ", ".join(
            f"{item.content_type} {item.blob.size_bytes} B" for item in snapshot.result.artifacts
        )
    errors, crashes = counted(snapshot.error_count, "error"), counted(snapshot.crash_count, "crash", "crashes")
    lines["attempts"] = f"{snapshot.attempts}, {errors}, {crashes}"
    for number, error in enumerate(snapshot.errors, 1):
        lines[f"error {number}"] = f"{error.get('message')} [{error.get('code')}]"
    return lines


def _plain(snapshot: JobSnapshot) -> dict[str, Any]:
    return dataclasses.asdict(snapshot)


def _targets(job_id: str, artifacts: list[tuple[Artifact, bytes]], output: Path | None) -> list[tuple[Path, bytes]]:
    if not artifacts:
        raise JobNotFinished(f"job {job_id} has no artifacts", job_id=job_id)
    if len(artifacts) == 1 and output is not None and not output.is_dir():
        return [(output, artifacts[0][1])]
    folder = output or Path()
    single = len(artifacts) == 1
    return [
        (folder / (f"{job_id}.{item.extension}" if single else f"{job_id}-{number}.{item.extension}"), data)
        for number, (item, data) in enumerate(artifacts)
    ]


def _vae_table(entries: list[VaeEntry]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "what", "channels", "compression", "layouts"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        time_part = f" × {entry.temporal} frames" if entry.temporal > 1 else ""
        table.add_row(
            entry.name,
            entry.title,
            str(entry.channels),
            f"{entry.spatial} px{time_part}",
            ", ".join(entry.layouts),
        )
    return table


def _cell(value: object) -> str:
    return ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
