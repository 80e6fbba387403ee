"""The gateway as an aiohttp application, and the server that runs it.

DESIGN. One process, one loop, and the small pools of threads of `AsyncDecodeClient`. Nothing that outlives a request is
kept here: jobs, keys, sessions, rates and figures are the broker's, so any gateway answers any poll. Whatever may take
long is bounded: bodies and answers by a rate, waits by a setting, connections by what `connections.py` says.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from broker_config.connection import Connections
from broker_config.errors import ConfigurationError
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog
from producer.gateway.api_keys import ApiKeys
from producer.gateway.connections import Runner
from producer.gateway.context import GATEWAY, build_gateway
from producer.gateway.middlewares import add_safe_headers, admit, answer_errors, count
from producer.gateway.reach import Reach
from producer.gateway.routes import add_routes
from producer.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

#: Longest request line that is parsed at all; aiohttp refuses longer ones in words of its own, we the others.
_LINE_BYTES = 1 << 16
#: How long running requests may take when the gateway is told to stop.
_STOP_S = 10.0


def build_app(
    connections: Connections, settings: Settings, own: GatewaySettings, *, catalog: VaeCatalog | None = None
) -> web.Application:
    """The application; it closes what it opened, not `connections`."""
    app = web.Application(middlewares=[count, answer_errors, admit])

    async def parts(app: web.Application) -> AsyncIterator[None]:
        gateway = build_gateway(connections, settings, own, catalog=catalog)
        app[GATEWAY] = gateway
        yield
        await gateway.client.close()

    async def stop_waiting(app: web.Application) -> None:
        app[GATEWAY].stopping.set()

    app.cleanup_ctx.append(parts)
    app.on_shutdown.append(stop_waiting)
    app.on_response_prepare.append(add_safe_headers)
    add_routes(app)
    return app


def check_startable(connections: Connections, settings: Settings, own: GatewaySettings, *, catalog: VaeCatalog) -> None:
    """Raises `ConfigurationError` if the gateway would let strangers in, or nobody."""
    if own.default_vae is not None:
        catalog[own.default_vae]
    why = Reach.of(settings, own).why_key
    if why is not None and not any(not key.revoked_ms for key in ApiKeys(connections).list()):
        raise ConfigurationError(
            f"the gateway needs a key, since {why}, and there is none: make one with `latentq keys add NAME` (while "
            "`latentq up --no-gateway` runs, if the broker is its own), or change that setting"
        )


async def serve(
    app: web.Application,
    own: GatewaySettings,
    *,
    announce: Callable[[str], None] = lambda url: None,
    stop: asyncio.Event | None = None,
) -> None:
    """Listens until `stop`, SIGTERM or SIGINT. `announce` gets the URL.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """
    ended = stop or asyncio.Event()
    if stop is None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
    runner = Runner(
        app,
        own,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=_STOP_S,
        keepalive_timeout=own.patience_s,
        max_line_size=_LINE_BYTES,
        max_field_size=own.max_header_bytes,
        lingering_time=min(10.0, own.patience_s),
        auto_decompress=False,  # a body of latents is not compressed; one that is could be a thousand times as long
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, own.host, own.port, backlog=1024).start()
        host, port = runner.addresses[0][:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        logger.info("the gateway answers at %s", url, extra={"action": "gateway_ready", "url": url})
        announce(url)
        await ended.wait()
        logger.info("the gateway stops", extra={"action": "gateway_stopping"})
    except OSError as error:
        raise ConfigurationError(
            f"the gateway cannot listen on {own.host}:{own.port} ({error.strerror}): set LATENTQ_GATEWAY_HOST and "
            "LATENTQ_GATEWAY_PORT"
        ) from error
    finally:
        await runner.cleanup()
