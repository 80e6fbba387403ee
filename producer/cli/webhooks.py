"""`latentq webhooks`: what is on its way, dead letters, sending again, stopped endpoints, secrets."""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table

from broker_config.settings import load_settings
from broker_config.url_guard import UrlGuard
from broker_config.webhook_deliveries import Delivery, DeliveryState, WebhookDeliveries
from broker_config.webhook_secrets import (
    LONGEST_OVERLAP_S,
    OVERLAP_S,
    WebhookSecrets,
    new_secret,
    owner_of_key,
    read_secrets,
)
from producer.cli.job_options import secret_in
from producer.cli.tables import show as show_table
from producer.client import DecodeClient
from producer.quantities import duration

_webhooks = typer.Typer(help="Webhooks: deliveries, dead letters, secrets.", no_args_is_help=True)
_secrets = typer.Typer(help="Secrets that sign webhooks whose jobs bring none.", no_args_is_help=True)

DeliveryId = Annotated[str, typer.Argument(metavar="ID", help="As `latentq webhooks list` shows it: msg_…")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OfKey = Annotated[str | None, typer.Option("--key", help="Id of a gateway's key. Without: of all that has no key.")]

# Options of commands that submit.
#: An attempt takes 15 s at most, and a courier looks twice a second.
_PING_WAIT_S: Final = 20.0
_LOOK_S: Final = 0.1
_PAGE: Final = 200


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    _webhooks.add_typer(_secrets, name="secrets")
    app.add_typer(_webhooks, name="webhooks")


@_webhooks.command(name="list")
def list_deliveries(
    pending: Annotated[bool, typer.Option("--pending", help="What is on its way, instead of dead letters.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the last one first, and endpoints that were stopped."""
    with DecodeClient.from_env() as client:
        deliveries = WebhookDeliveries(client.store.connections, load_settings())
        found = deliveries.page("pending" if pending else "dead", limit=limit).deliveries
        stopped = deliveries.stopped()
        counts = deliveries.counts()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(item) for item in found], indent=2))
        return
    if found:
        show_table(_table(found))
    typer.echo(f"{counts.pending} pending, {counts.dead_letters} dead letters, {counts.couriers} couriers", err=True)
    for endpoint in stopped:
        typer.echo(f"stopped: {endpoint} (it answered 410; `latentq webhooks enable` undoes it)", err=True)


@_webhooks.command()
def show(delivery_id: DeliveryId, as_json: AsJson = False) -> None:
    """Show a delivery with every attempt."""
    with DecodeClient.from_env() as client:
        found = WebhookDeliveries(client.store.connections, load_settings()).show(delivery_id)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
        return
    _describe(found)


@_webhooks.command()
def redeliver(
    delivery_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="A delivery; or use --all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every dead letter.")] = False,
) -> None:
    """Send a delivery again at once, with a new schedule, under its id."""
    if (delivery_id is None) is not every:
        raise typer.BadParameter("name one delivery, or use --all")
    with DecodeClient.from_env() as client:
        deliveries = WebhookDeliveries(client.store.connections, load_settings())
        if delivery_id is not None:
            queued = deliveries.redeliver(delivery_id)
            typer.echo("it is sent again" if queued else "it is on its way already")
            return
        count = sum(deliveries.redeliver(item) for item in _every_dead_letter(deliveries))
    typer.echo(f"{count} are sent again")


@_webhooks.command()
def ping(
    url: Annotated[str, typer.Argument(metavar="URL", help="A receiver.")],
    key: OfKey = None,
) -> None:
    """Send a message of type `ping` to a receiver, signed with the secrets of a key, and say what came back."""
    settings = load_settings()
    target = UrlGuard.of(settings).check_url(url, option="URL")
    with DecodeClient.from_env() as client:
        deliveries = WebhookDeliveries(client.store.connections, settings)
        ping_id = deliveries.ping(target, signer=owner_of_key(key), key_id=key)
        deadline = time.monotonic() + _PING_WAIT_S
        found = deliveries.show(ping_id)
        while found.state in (DeliveryState.PENDING, DeliveryState.SENDING) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            found = deliveries.show(ping_id)
        couriers = deliveries.counts().couriers
    if found.state in (DeliveryState.PENDING, DeliveryState.SENDING):
        typer.echo("no answer yet" + ("" if couriers else ": no courier runs, start one with `latentq courier`"))
        raise typer.Exit(1)
    _describe(found)
    if found.state is not DeliveryState.DELIVERED:
        raise typer.Exit(1)


@_webhooks.command()
def enable(
    endpoint: Annotated[str, typer.Argument(metavar="URL", help="As `latentq webhooks list` shows it.")],
) -> None:
    """Let messages go again to an endpoint that answered 410."""
    with DecodeClient.from_env() as client:
        was = WebhookDeliveries(client.store.connections, load_settings()).enable(endpoint)
    typer.echo("enabled; `latentq webhooks redeliver` sends what it missed" if was else "it was not stopped")


@_secrets.command()
def add(
    key: OfKey = None,
    file: Annotated[Path | None, typer.Option(help="File with a secret of yours. Without: a new one.")] = None,
    overlap: Annotated[
        float,
        typer.Option(
            min=0,
            max=LONGEST_OVERLAP_S,
            help="How long older secrets go on signing beside it: seconds, at most a year.",
        ),
    ] = OVERLAP_S,
) -> None:
    """Add a secret, and end the older ones after a while; prints a new one once."""
    secret = new_secret() if file is None else read_secrets(secret_in(file), option="the file")[0]
    with DecodeClient.from_env() as client:
        made = WebhookSecrets(client.store.connections).add(owner_of_key(key), secret, overlap_s=overlap)
    typer.echo(f"secret {made.id} signs webhooks of {_owner(key)}; it is shown this once", err=True)
    if file is None:
        typer.echo(secret)


@_secrets.command(name="list")
def list_secrets(key: OfKey = None) -> None:
    """List the secrets that sign now, by id; the secrets themselves are not shown."""
    with DecodeClient.from_env() as client:
        found = WebhookSecrets(client.store.connections).of(owner_of_key(key))
    for item in found:
        until = f"until {_time(item.until_ms)}" if item.until_ms else "until there is a newer one"
        typer.echo(f"{item.id}  made {_time(item.made_ms)}, {until}")
    if not found:
        typer.echo(f"no secrets of {_owner(key)}: make one with `latentq webhooks secrets add`", err=True)


@_secrets.command()
def remove(
    secret_id: Annotated[str, typer.Argument(metavar="ID", help="As `latentq webhooks secrets list` shows it.")],
    key: OfKey = None,
) -> None:
    """End a secret at once."""
    with DecodeClient.from_env() as client:
        was = WebhookSecrets(client.store.connections).remove(owner_of_key(key), secret_id)
    typer.echo("removed" if was else f"there is no secret {secret_id} of {_owner(key)}")


def _every_dead_letter(deliveries: WebhookDeliveries) -> list[str]:
    """Ids of those there are now: one that fails again at once is not sent a second time."""
    page = deliveries.page("dead", limit=_PAGE)
    ids = [item.id for item in page.deliveries]
    while page.cursor is not None:
        page = deliveries.page("dead", limit=_PAGE, after=page.cursor)
        ids += [item.id for item in page.deliveries]
    return ids


def _owner(key: str | None) -> str:
    return "all that has no key" if key is None else f"key {key}"


def _table(found: tuple[Delivery, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("id", "event", "receiver", "age", "tries", "last"):
        table.add_column(heading, overflow="fold")
    for item in found:
        last = item.attempts[-1] if item.attempts else None
        said = "" if last is None else " ".join(part for part in (str(last.status or ""), last.error) if part)
        age = duration(max(0.0, time.time() - item.at_ms / 1000))
        table.add_row(item.id, item.event, item.receiver, age, str(item.tries), said or item.reason)
    return table


def _describe(found: Delivery) -> None:
    lines = {"delivery": found.id, "job": found.job_id, "event": str(found.event), "state": str(found.state)}
    lines |= {"why": found.reason, "url": found.url}
    if found.state is DeliveryState.PENDING:
        lines["next"] = _time(found.due_ms)
    for name, value in lines.items():
        if value:
            typer.echo(f"{name:>9}  {value}")
    for number, attempt in enumerate(found.attempts, 1):
        said = " ".join(part for part in (str(attempt.status or "no answer"), attempt.error) if part)
        typer.echo(f"{number:>9}  {_time(attempt.at_ms)}  {attempt.duration_ms} ms  {said}")


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
