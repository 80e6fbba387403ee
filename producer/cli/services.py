"""Commands that run things: up, demo, worker, janitor, gateway, courier, bench."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from broker_config.logs import configure_logging
from broker_config.settings import load_settings
from producer.supervisor import sharing_cores

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def register(app: typer.Typer) -> None:
    """Adds these commands to `app`."""
    app.command()(up)
    app.command()(demo)
    app.command(context_settings=_PASS_ON)(worker)
    app.command(context_settings=_PASS_ON)(janitor)
    app.command(context_settings=_PASS_ON)(gateway)
    app.command(context_settings=_PASS_ON)(courier)
    app.command(context_settings=_PASS_ON)(bench)


def up(
    vae: Annotated[list[str] | None, typer.Option(help="Catalogue entry to serve; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="Device of the worker, e.g. cuda:0.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    with_gateway: Annotated[bool, typer.Option("--gateway/--no-gateway", help="Whether to serve HTTP, too.")] = True,
) -> None:
    """Run everything on this machine until stopped: broker, worker, janitor, gateway, courier."""
    from producer.gateway.settings import load_gateway_settings
    from producer.local_stack import GatewayAddress, LocalStack

    settings = load_settings()
    configure_logging(settings)
    address = None
    if with_gateway:
        own = load_gateway_settings()
        address = GatewayAddress(host=own.host, port=own.port)
    stack = LocalStack(settings, vaes=tuple(vae or ("demo",)), device=device, workers=workers, gateway=address)
    raise typer.Exit(stack.run_until_stopped(announce=typer.echo))


def demo(
    out: Annotated[Path, typer.Option(help="Where pictures and video go.")] = Path("demo-output"),
) -> None:
    """Send real latents the whole way, on a broker of their own; leaves pictures and a video."""
    from producer.demo import run_demo

    raise typer.Exit(run_demo(out))


def worker(context: typer.Context) -> None:
    """Run a worker: latentq worker --vae sdxl --vae flux --device cuda:0 (`--help` lists its options)."""
    become("worker", context.args)


def janitor(context: typer.Context) -> None:
    """Run a janitor: returns jobs of dead workers, ends retention. Several may run; one leads."""
    become("worker.janitor", context.args)


def gateway(context: typer.Context) -> None:
    """Run a gateway: HTTP for clients without Redis, and the status page. Several may run."""
    become("producer.gateway", context.args)


def courier(context: typer.Context) -> None:
    """Run a courier: delivers webhooks. Several may run; they share the work."""
    become("worker.courier", context.args)


def bench(context: typer.Context) -> None:
    """Measure decodes on this device: time and memory, plain, tiled, low-memory (`--help` lists its options)."""
    become("worker.bench", context.args)


def become(module: str, arguments: list[str]) -> NoReturn:
    """Replaces this process, so that signals and the exit status are the service's own."""
    command = [sys.executable, "-m", module, *arguments]
    os.execve(sys.executable, command, sharing_cores(os.environ))  # noqa: S606  no shell is involved
