"""`latentq`: the one command. Each group of commands is a module; errors become one line and an exit status.

Exit status: 0 done; 1 refused or failed, with one line on standard error that ends in the error's code; 2 wrong usage
or a configuration that cannot work.
"""

from __future__ import annotations

import sys

import typer

from broker_config.errors import ConfigurationError, LatentqError
from producer.cli import generate, jobs, keys, operations, services, spool, submit, webhooks

app = typer.Typer(
    name="latentq",
    help="A queue for diffusion latents: push latents, get decoded images and videos back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
services.register(app)
submit.register(app)
jobs.register(app)
operations.register(app)
keys.register(app)
webhooks.register(app)
generate.register(app)
spool.register(app)


def main() -> None:
    """Entry point of the `latentq` command."""
    try:
        app()
    except LatentqError as error:
        print(f"latentq: {error.message} [{error.code}]", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigurationError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["app", "main"]
