"""Options that `submit` and `redecode` share, and what both do once the job is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from broker_config.errors import InvalidOption, JobSpooled
from producer.job_handle import JobHandle

OptOutput = Annotated[str | None, typer.Option(help="png, jpg, webp, mp4, tensor or uint8.")]
OptMetadata = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Written into the artifacts; repeatable.")
]
OptFps = Annotated[float | None, typer.Option(help="Frames per second of an mp4.")]
OptMode = Annotated[str | None, typer.Option(help="exact or fast.")]
OptTimeout = Annotated[float | None, typer.Option("--timeout", help="Longest attempt, seconds.")]
OptRetention = Annotated[
    float | None, typer.Option("--retention", help="How long latents and result stay after the end, seconds.")
]
OptWait = Annotated[bool, typer.Option("--wait", help="Wait until the job ended.")]
OptPriority = Annotated[str, typer.Option(help="high, normal or low.")]
OptWebhook = Annotated[str | None, typer.Option(metavar="URL", help="Is told how the job goes.")]
OptWebhookEvents = Annotated[
    str | None,
    typer.Option(metavar="EVENT,…", help="Of queued, processing, progress, succeeded, failed, canceled."),
]
OptWebhookInline = Annotated[bool, typer.Option("--webhook-inline", help="Small artifacts travel in the message.")]
OptWebhookSecret = Annotated[
    Path | None, typer.Option("--webhook-secret-file", help="File with the secret that signs the messages.")
]
OptProvenance = Annotated[
    bool, typer.Option("--provenance/--no-provenance", help="Whether artifacts say how they were made.")
]


def secret_in(file: Path | None) -> str | None:
    """What a file that was named has."""
    return None if file is None else file.read_text().strip()


def after_submit(job: JobHandle, *, wait: bool) -> None:
    """Prints a new job's id and whom it waits for; with `wait`, returns when it succeeded."""
    typer.echo(job.id)
    try:
        snapshot = job.snapshot()
    except JobSpooled as error:
        typer.echo(f"note: {error.message}; `latentq spool flush` hands it over", err=True)
        if not wait:
            return
        snapshot = job.wait()
    if not snapshot.served and not snapshot.status.is_terminal:
        typer.echo(f"note: no worker serves {snapshot.vae} now; the job waits for one", err=True)
    if wait:
        snapshot = job.wait()
        typer.echo(snapshot.status, err=True)
        job.result()


def pairs(items: list[str] | None) -> dict[str, str]:
    """KEY=VALUE, repeated."""
    found = {}
    for item in items or []:
        key, separator, value = item.partition("=")
        if not separator:
            raise InvalidOption(f"--metadata {item!r} is not KEY=VALUE", field="metadata")
        found[key] = value
    return found
