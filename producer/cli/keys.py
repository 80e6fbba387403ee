"""`latentq keys`: make, list and revoke the keys of gateways."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Annotated

import typer
from rich.table import Table

from producer.cli.tables import show
from producer.client import DecodeClient
from producer.gateway.api_keys import ApiKeys, Scope
from producer.quantities import duration

_keys = typer.Typer(help="Keys of the gateway: who may submit and see what.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    app.add_typer(_keys, name="keys")


@_keys.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; for people.")],
    scope: Annotated[
        list[Scope] | None, typer.Option(help="What it may do; repeatable. Without: submit and read.")
    ] = None,
    rate_per_min: Annotated[
        float | None, typer.Option(min=0.01, help="Submits a minute. Without: the gateway's setting.")
    ] = None,
    jobs_per_day: Annotated[
        int | None, typer.Option(min=1, help="Jobs a day (UTC). Without: the gateway's setting.")
    ] = None,
) -> None:
    """Make a key; prints it once, it is stored as a digest only."""
    with DecodeClient.from_env() as client:
        key, token = ApiKeys(client.store.connections).add(
            name, scope or [Scope.SUBMIT, Scope.READ], rate_per_min=rate_per_min, jobs_per_day=jobs_per_day
        )
    typer.echo(f"key {key.id} for {key.name}: {', '.join(key.scopes)}; it is shown this once", err=True)
    typer.echo(token)


@_keys.command(name="list")
def list_keys(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the keys, revoked ones included."""
    with DecodeClient.from_env() as client:
        found = ApiKeys(client.store.connections).list()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(key) for key in found], indent=2))
        return
    if not found:
        typer.echo("no keys: make one with `latentq keys add NAME`", err=True)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("id", "name", "scopes", "age", ""):
        table.add_column(heading, overflow="fold")
    for key in found:
        age = duration(max(0.0, time.time() - key.created_ms / 1000))
        table.add_row(key.id, key.name, ", ".join(key.scopes), age, "revoked" if key.revoked_ms else "")
    show(table)


@_keys.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID", help="As `latentq keys list` shows it.")]) -> None:
    """End a key for good. Gateways notice within two seconds; its jobs stay."""
    with DecodeClient.from_env() as client:
        key = ApiKeys(client.store.connections).revoke(key_id)
    typer.echo(f"key {key.id} of {key.name} is revoked")
