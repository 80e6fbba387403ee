"""Options that `submit` and `redecode` share, and what both do once the job is accepted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from broker_config.errors import InvalidOption, JobSpooled
from producer.decode_options import DecodeOptions
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
OptScalingFactor = Annotated[float | None, typer.Option(help="Instead of the VAE's own.")]
OptShiftFactor = Annotated[float | None, typer.Option(help="Instead of the VAE's own.")]
OptStartWithin = Annotated[float | None, typer.Option("--start-within", help="Longest wait, seconds.")]
OptId = Annotated[str | None, typer.Option("--id", help="Your own id; the same id is the same job.")]
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


#: Names of the options of a job.
_NAMES: Final = frozenset(item.name for item in dataclasses.fields(DecodeOptions))


def named_options(ctx: typer.Context) -> dict[str, Any]:
    """The options of a job that were given, by name."""
    # click has an empty list for an option that may be repeated and was not named
    given = {name: value for name, value in ctx.params.items() if name in _NAMES and value not in (None, [], ())}
    if "metadata" in given:
        given["metadata"] = pairs(given["metadata"])
    if "webhook_secret" in given:
        given["webhook_secret"] = secret_in(given["webhook_secret"])
    return given


def secret_in(file: Path) -> str:
    """What a file has.

    Raises:
        InvalidOption: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidOption(f"the secret's file {file} cannot be read: {reason}", field="webhook_secret") from None


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
