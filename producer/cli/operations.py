"""Commands about the queue as a whole: queues, workers, jobs, pause, resume, drain, purge, requeue-failed, doctor."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Final

import typer

from broker_config.job_list import JobRow
from broker_config.job_status import JobStatus
from broker_config.settings import load_settings
from producer.cli.tables import diagnosis_table, job_table, queue_table, show, summary, worker_table
from producer.client import DecodeClient
from producer.doctor import DEFAULT_LONG_WAIT_S, DEFAULT_MAX_KEYS, diagnose
from producer.operations import DrainState, Operations, RequeueOutcome
from producer.quantities import counted

Vae = Annotated[str, typer.Argument(metavar="VAE", help="Name in the catalogue, as `latentq queues` lists it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfVae = Annotated[str | None, typer.Option(help="Of this VAE only.")]

#: Seconds between two lines of `drain` where it cannot rewrite one.
_LINE_EVERY_S: Final = 5.0


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    for command in (queues, workers, jobs, pause, resume, drain, purge, requeue_failed, doctor):
        app.command()(command)


def queues(as_json: AsJson = False) -> None:
    """List the queues: how much waits, for how long, who serves it."""
    with DecodeClient.from_env() as client:
        found = Operations(client).report.queues()
    if as_json:
        _echo_json([dataclasses.asdict(queue) | {"name": queue.name} for queue in found])
    elif found:
        show(queue_table(found))
    else:
        typer.echo("no queues: nothing was submitted yet", err=True)


def workers(as_json: AsJson = False) -> None:
    """List the live workers: what they serve and how busy they are."""
    with DecodeClient.from_env() as client:
        found = Operations(client).report.workers(client.catalog)
    if as_json:
        _echo_json([dataclasses.asdict(worker) | {"busy_share": worker.busy_share} for worker in found])
    elif found:
        show(worker_table(found))
    else:
        typer.echo("no live worker: start one with `latentq worker --vae NAME`", err=True)


def jobs(
    status: Annotated[JobStatus | None, typer.Option(help="In this state only.")] = None,
    vae: OfVae = None,
    limit: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first. Expired ones are on no list: `latentq status ID`."""
    with DecodeClient.from_env() as client:
        found = Operations(client).jobs.newest(status=status, vae=vae, limit=limit)
    if as_json:
        _echo_json([_plain(row) for row in found])
    elif found:
        show(job_table(found))
    else:
        typer.echo("no such jobs" if status or vae else "no jobs", err=True)


def pause(vae: Vae) -> None:
    """Hold a VAE back: workers take no more of its jobs, submits go on."""
    with DecodeClient.from_env() as client:
        changed = Operations(client).pause(vae)
    typer.echo(f"{vae} is paused" if changed else f"{vae} was paused already")


def resume(vae: Vae) -> None:
    """Let a paused VAE go on."""
    with DecodeClient.from_env() as client:
        changed = Operations(client).resume(vae)
    typer.echo(f"{vae} goes on" if changed else f"{vae} was not paused")


def drain(
    vae: Annotated[str | None, typer.Argument(metavar="[VAE]", help="One VAE; all, if not given.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="How long to wait, seconds.")] = None,
) -> None:
    """Wait until nothing is queued or processing. Of a paused VAE only what is processing is waited for."""
    with DecodeClient.from_env() as client:
        states = Operations(client).drain(vae, timeout_s=timeout)
        if sys.stdout.isatty():
            _drain_in_place(states)
        else:
            _drain_by_line(states)


def purge(
    queue: Annotated[str, typer.Argument(metavar="QUEUE", help="`sdxl.low`, or `sdxl` for all three of a VAE.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Cancel every job that waits in a queue. What is processing goes on; latents stay for their retention."""
    with DecodeClient.from_env() as client:
        operations = Operations(client)
        waiting = operations.waiting(operations.queue_names(queue))
        count = sum(len(ids) for ids in waiting.values())
        if count == 0:
            typer.echo(f"nothing waits in {queue}")
            return
        if not yes:
            each = ", ".join(f"{len(ids)} in {name}" for name, ids in waiting.items() if ids)
            typer.confirm(f"Cancel {counted(count, 'waiting job')} ({each})?", abort=True)
        purged = operations.purge(waiting)
    typer.echo(f"canceled {counted(purged.canceled, 'job')}")
    if purged.taken:
        typer.echo(f"{counted(purged.taken, 'job')} went to a worker meanwhile and will be decoded", err=True)
    if purged.foreign:
        typer.echo(f"{counted(purged.foreign, 'job')} of other programs left there; a worker will fail them", err=True)


def requeue_failed(
    vae: OfVae = None,
    code: Annotated[str | None, typer.Option(help="Only those that ended with this error, e.g. out_of_memory.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many new jobs to make.")] = None,
) -> None:
    """Try failed jobs again: a new job from each one's retained latents. Safe to repeat. Prints old → new."""
    outcomes: Counter[RequeueOutcome] = Counter()
    with DecodeClient.from_env() as client:
        for item in Operations(client).requeue_failed(vae=vae, code=code, limit=limit):
            outcomes[item.outcome] += 1
            if item.outcome is RequeueOutcome.QUEUED:
                typer.echo(f"{item.failed_id} → {item.new_id}")
            elif item.outcome is RequeueOutcome.REFUSED:
                typer.echo(f"{item.failed_id}: refused: {item.reason}", err=True)
    parts = [f"{number} {outcome}" for outcome, number in outcomes.items()]
    typer.echo(", ".join(parts) or "no failed jobs", err=True)


def doctor(
    long_wait: Annotated[
        float, typer.Option(min=0, help="A job of a served VAE that waits longer than this is named, seconds.")
    ] = DEFAULT_LONG_WAIT_S,
    scan: Annotated[
        int, typer.Option(min=1, help="Keys of the broker to look at for lost jobs and strays.")
    ] = DEFAULT_MAX_KEYS,
    as_json: AsJson = False,
) -> None:
    """Examine broker and queue; says what is wrong and what to do. Exit status 1 if there is a problem."""
    diagnosis = diagnose(load_settings(), long_wait_s=long_wait, max_keys=scan)
    if as_json:
        _echo_json([dataclasses.asdict(finding) for finding in diagnosis.findings])
    else:
        show(diagnosis_table(diagnosis))
        typer.echo(f"\n{summary(diagnosis)}")
    if not diagnosis.healthy:
        raise typer.Exit(1)


def _drain_in_place(states: Iterable[DrainState]) -> None:
    from rich.console import Console

    with Console().status("looking") as line:
        for state in states:
            line.update(_left(state))
    typer.echo(_left(state))


def _drain_by_line(states: Iterable[DrainState]) -> None:
    last_s = -_LINE_EVERY_S
    for state in states:
        if state.done or time.monotonic() - last_s >= _LINE_EVERY_S:
            typer.echo(_left(state))
            last_s = time.monotonic()


def _left(state: DrainState) -> str:
    text = f"{state.queued} queued, {state.processing} processing"
    if state.held_back:
        text += f"; {state.held_back} of paused VAEs stay queued"
    if state.unserved:
        text += f"; no worker serves {', '.join(state.unserved)}"
    return text


def _plain(row: JobRow) -> dict[str, Any]:
    wire = {name: value for name, value in dataclasses.asdict(row).items() if name != "request"}
    request = row.request
    if request is not None:
        names = ("output", "width", "height", "num_frames", "batch", "source_job_id")
        wire |= {name: getattr(request, name) for name in names}
    return wire


def _echo_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
