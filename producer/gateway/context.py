"""What handlers share: the client, the settings, and who counts what. Built once, found under one key of the app."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aiohttp import web

from broker_config.connection import Connections
from broker_config.link_signing import LinkSigner
from broker_config.settings import Settings
from broker_config.tally import Tallies
from broker_config.url_guard import UrlGuard
from broker_config.vae_catalog import VaeCatalog
from broker_config.webhook_deliveries import WebhookDeliveries
from broker_config.webhook_secrets import WebhookSecrets
from producer.async_client import AsyncDecodeClient
from producer.gateway.api_keys import ApiKey, ApiKeys
from producer.gateway.byte_gate import ByteGate
from producer.gateway.identity import Identity
from producer.gateway.looking import Lookout
from producer.gateway.reach import Reach
from producer.gateway.sessions import Sessions
from producer.gateway.settings import GatewaySettings
from producer.gateway.streams import StreamGate
from producer.gateway.throttle import Throttle
from producer.operations import Operations

if TYPE_CHECKING:
    from producer.gateway.metrics import GatewayMetrics
    from producer.gateway.overview import Overviews

#: How long a key is believed in before it is looked up again: a revoked one ends within this.
_KEY_S: Final = 2.0
_KEYS_KEPT: Final = 1024


@dataclass(kw_only=True)
class Gateway:
    """Everything behind the routes of one gateway."""

    settings: Settings
    own: GatewaySettings
    reach: Reach
    client: AsyncDecodeClient
    keys: ApiKeys
    sessions: Sessions
    throttle: Throttle
    operations: Operations
    tallies: Tallies
    uploads: ByteGate
    downloads: ByteGate
    streams: StreamGate
    metrics: GatewayMetrics
    overviews: Overviews
    lookout: Lookout
    #: None: links are not configured, so there are none.
    links: LinkSigner | None
    deliveries: WebhookDeliveries
    secrets: WebhookSecrets
    guard: UrlGuard
    #: Set when the gateway is told to stop: who waits, or watches, is answered then and goes on elsewhere.
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _known: dict[str, tuple[float, ApiKey | None]] = field(default_factory=dict)

    async def key_of_token(self, token: str) -> ApiKey | None:
        """The key that a token belongs to, looked up at most every two seconds."""
        now = time.monotonic()
        known = self._known.get(token)
        if known is None or known[0] < now:
            if len(self._known) >= _KEYS_KEPT:
                self._known.clear()
            known = (now + _KEY_S, await self.client.run(self.keys.of_token, token))
            if known[1] is not None:  # tokens that are none are not worth keeping
                self._known[token] = known
        return known[1]


GATEWAY: Final = web.AppKey("gateway", Gateway)
IDENTITY: Final[web.RequestKey[Identity]] = web.RequestKey("identity", Identity)


def build_gateway(
    connections: Connections, settings: Settings, own: GatewaySettings, *, catalog: VaeCatalog | None = None
) -> Gateway:
    """The parts of a gateway. Call it in the loop that it will run in."""
    from producer.gateway.metrics import GatewayMetrics
    from producer.gateway.overview import Overviews

    client = AsyncDecodeClient(connections, settings=settings, catalog=catalog)
    operations = Operations(client.blocking)
    keys = ApiKeys(connections)
    tallies = Tallies(connections)
    deliveries = WebhookDeliveries(connections, settings)
    return Gateway(
        settings=settings,
        own=own,
        reach=Reach.of(settings, own),
        client=client,
        keys=keys,
        sessions=Sessions(connections, keys, own),
        throttle=Throttle(connections, own),
        operations=operations,
        tallies=tallies,
        uploads=ByteGate("read", most=own.max_uploads, most_bytes=own.max_uploads_bytes, share=own.max_key_share),
        downloads=ByteGate(
            "sent", most=own.max_connections, most_bytes=own.max_downloads_bytes, share=own.max_key_share
        ),
        streams=StreamGate(own),
        metrics=GatewayMetrics(client, operations, tallies, deliveries),
        overviews=Overviews(client, operations, tallies),
        lookout=Lookout(client),
        deliveries=deliveries,
        secrets=WebhookSecrets(connections),
        guard=UrlGuard.of(settings),
        links=LinkSigner(settings.link_keys, settings.public_url or "") if settings.link_keys else None,
    )
