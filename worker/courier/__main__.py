"""`python -m worker.courier`: a courier process. `latentq courier` starts this."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

from broker_config.connection import connect
from broker_config.errors import ConfigurationError, LatentqError
from broker_config.exit_status import exit_status
from broker_config.job_store import JobStore
from broker_config.logs import configure_logging
from broker_config.settings import Settings, load_settings
from broker_config.url_guard import UrlGuard
from broker_config.webhook_outbox import WebhookOutbox
from worker.courier.attempt import Sender
from worker.courier.courier import Courier
from worker.courier.guarded_connector import guarded_session
from worker.courier.settings import CourierSettings, load_courier_settings


async def run_courier(settings: Settings, own: CourierSettings, *, stop: asyncio.Event | None = None) -> None:
    """Runs a courier in this loop until `stop`, SIGTERM or SIGINT.

    Raises:
        LatentqError: no broker is configured or running, or links cannot be signed.
    """
    ended = stop or asyncio.Event()
    if stop is None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
    if settings.public_url is None or not settings.link_keys:
        raise ConfigurationError("a courier needs LATENTQ_PUBLIC_URL and LATENTQ_LINK_KEY, for the links it sends")
    connections = connect(settings, name=f"latentq-courier-{own.name}")
    try:
        async with guarded_session(
            UrlGuard.of(settings),
            timeout_s=own.timeout_s,
            connections=own.concurrency,
            connections_per_host=own.per_receiver,
        ) as session:
            courier = Courier(
                JobStore(connections, settings),
                settings,
                own,
                outbox=WebhookOutbox(connections, settings),
                sender=Sender(session, timeout_s=own.timeout_s, max_answer_bytes=own.max_answer_bytes),
            )
            await courier.run(ended)
    finally:
        connections.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a courier; returns its exit status: 0 stopped, 2 not startable, 75 the broker is away."""
    parser = argparse.ArgumentParser(prog="latentq courier", description="Delivers webhooks until stopped.")
    parser.add_argument("--name", help="unique name; default: host, pid and a random part")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        settings = load_settings()
        configure_logging(settings)
        asyncio.run(run_courier(settings, load_courier_settings(name=arguments.name)))
    except LatentqError as error:
        print(f"latentq courier: {error.message} [{error.code}]", file=sys.stderr)
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
