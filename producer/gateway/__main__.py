"""`python -m producer.gateway`: a gateway process. `latentq gateway` starts this."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Final

from broker_config.connection import connect
from broker_config.errors import LatentqError
from broker_config.exit_status import exit_status
from broker_config.logs import configure_logging
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from producer.gateway.app import build_app, check_startable, serve
from producer.gateway.settings import load_gateway_settings

#: How long a thread may keep the interpreter while the loop wants it; Python's 5 ms are a long time for a poll.
SWITCH_S: Final = 0.001


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="latentq gateway", description="Serves HTTP until stopped.")
    parser.add_argument("--host", help="address to listen on; any but loopback needs keys (`latentq keys add`)")
    parser.add_argument("--port", type=int, help="port to listen on; 0: any free one")
    parser.add_argument("--default-vae", help="VAE of POST /, where the path names none")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a gateway; returns its exit status: 0 stopped, 2 not startable, 75 the broker is away."""
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    try:
        settings = load_settings()
        configure_logging(settings)
        own = load_gateway_settings(host=arguments.host, port=arguments.port, default_vae=arguments.default_vae)
        catalog = VaeCatalog.load(settings.catalog)
        connections = connect(settings, name="latentq-gateway")
        sys.setswitchinterval(SWITCH_S)
        try:
            check_startable(connections, settings, own, catalog=catalog)
            asyncio.run(serve(build_app(connections, settings, own, catalog=catalog), own, announce=_say))
        finally:
            connections.close()
    except LatentqError as error:
        print(f"latentq gateway: {error.message} [{error.code}]", file=sys.stderr)
        return exit_status(error)
    return 0


def _say(url: str) -> None:
    print(f"gateway  {url}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
