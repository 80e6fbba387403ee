"""`/v1/webhooks`: deliveries that were given up or are on their way, and the secrets that sign them.

Whoever submitted a job sees its deliveries and may send them again; who sees everyone's jobs sees everyone's
deliveries, but not the URLs, which may hold the receivers' own secrets. A secret goes in and never comes out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final, Literal

from aiohttp import web

from broker_config import webhook_deliveries as outbox
from broker_config.errors import BadRequest, DeliveryNotFound, InvalidOption, WebhookSecretMissing
from broker_config.webhook_secrets import OVERLAP_S, owner_of_key
from broker_config.webhook_secrets import WebhookSecret as StoredSecret
from producer.gateway import jobs
from producer.gateway.api_keys import Scope
from producer.gateway.context import Gateway
from producer.gateway.identity import Identity
from producer.gateway.query import only, read, seconds, whole
from producer.gateway.schemas import Delivery, DeliveryPage, WebhookSecret, WebhookSecrets
from producer.gateway.streams import json_response
from producer.gateway.uploads import small_json
from producer.gateway.webhook_views import delivery_url, owned_by, show_delivery, time_of

MOST_DELIVERIES: Final = 200
_PAGE_DELIVERIES: Final = 50
_ID = re.compile(r"msg_[A-Za-z0-9_-]{1,100}")
_NO_STORE: Final = {"Cache-Control": "no-store"}


async def list_deliveries(request: web.Request) -> web.StreamResponse:
    """`GET /v1/webhooks`."""
    gateway, identity = jobs.context(request)
    query = request.query
    only(query, "state", "limit", "cursor", "job")
    identity.require(Scope.READ)
    if "job" in query:
        only(query, "job")
        job = await jobs.find(gateway, identity, query["job"])
        found = await gateway.client.run(gateway.deliveries.of_job, job.job_id)
        return _page(found, identity, cursor=None)
    which: Literal["dead", "pending"] = "pending" if query.get("state") == "pending" else "dead"
    if query.get("state", which) != which:
        raise InvalidOption(f"state is {query['state'][:40]!r}, expected dead or pending", field="state")
    limit = read("limit", query.get("limit", str(_PAGE_DELIVERIES)), whole, "a whole number")
    if not 1 <= limit <= MOST_DELIVERIES:
        raise InvalidOption(f"limit is {limit}, expected 1 to {MOST_DELIVERIES}", field="limit")
    page = await gateway.client.run(
        lambda: gateway.deliveries.page(which, limit=limit, after=query.get("cursor"), key_id=owned_by(identity))
    )
    return _page(page.deliveries, identity, cursor=page.cursor)


async def show(request: web.Request) -> web.StreamResponse:
    """`GET /v1/webhooks/{delivery}`."""
    gateway, identity = jobs.context(request)
    only(request.query)
    return _answer(await _find(request, gateway, identity), identity)


async def redeliver(request: web.Request) -> web.StreamResponse:
    """`POST /v1/webhooks/{delivery}/redeliver`: 202 it is sent; 200 it is on its way already."""
    gateway, identity = jobs.context(request)
    only(request.query)
    found = await _find_to_change(request, gateway, identity)
    new = await gateway.client.run(gateway.deliveries.redeliver, found.id)
    found = await gateway.client.run(gateway.deliveries.show, found.id)
    return _answer(found, identity, status=202 if new else 200)


async def enable(request: web.Request) -> web.StreamResponse:
    """`POST /v1/webhooks/{delivery}/enable`: its endpoint is called again, although it answered 410."""
    gateway, identity = jobs.context(request)
    only(request.query)
    found = await _find_to_change(request, gateway, identity)
    await gateway.client.run(gateway.deliveries.enable, found.endpoint)
    return _answer(found, identity)


async def ping(request: web.Request) -> web.StreamResponse:
    """`POST /v1/webhooks/ping` with `{"url": URL}`."""
    gateway, identity = jobs.context(request)
    only(request.query)
    identity.require(Scope.SUBMIT)
    body = await _object(request, gateway, "url")
    url = gateway.guard.check_url(body["url"], option="url")
    await _spend(gateway, identity)
    key_id = _key_id(identity)
    signer = owner_of_key(key_id)
    if not await gateway.client.run(gateway.secrets.of, signer):
        raise WebhookSecretMissing("there is no secret to sign with: add one with POST /v1/webhook-secrets")
    name = await gateway.client.run(lambda: gateway.deliveries.ping(url, signer=signer, key_id=key_id))
    found = await gateway.client.run(gateway.deliveries.show, name)
    return _answer(found, identity, status=202, headers={"Location": delivery_url(name)})


async def list_secrets(request: web.Request) -> web.StreamResponse:
    """`GET /v1/webhook-secrets`: the newest first."""
    gateway, identity = jobs.context(request)
    only(request.query)
    identity.require(Scope.READ)
    found = await gateway.client.run(gateway.secrets.of, owner_of_key(_key_id(identity)))
    return json_response(WebhookSecrets(secrets=[_shown(secret) for secret in found]), headers=_NO_STORE)


async def add_secret(request: web.Request) -> web.StreamResponse:
    """`POST /v1/webhook-secrets` with `{"secret": "whsec_…", "overlap_s": 86400}`."""
    gateway, identity = jobs.context(request)
    only(request.query)
    identity.require(Scope.SUBMIT)
    body = await _object(request, gateway, "secret")
    overlap_s = read("overlap_s", str(body.get("overlap_s", OVERLAP_S)), seconds, "seconds, 0 or more")
    owner = owner_of_key(_key_id(identity))
    made = await gateway.client.run(lambda: gateway.secrets.add(owner, body["secret"], overlap_s=overlap_s))
    return json_response(_shown(made), status=201, headers=_NO_STORE)


async def remove_secret(request: web.Request) -> web.StreamResponse:
    """`DELETE /v1/webhook-secrets/{secret}`: by its id, and also if it is not there."""
    gateway, identity = jobs.context(request)
    only(request.query)
    identity.require(Scope.SUBMIT)
    owner = owner_of_key(_key_id(identity))
    await gateway.client.run(gateway.secrets.remove, owner, request.match_info["secret"])
    return web.Response(status=204)


async def _find(request: web.Request, gateway: Gateway, identity: Identity) -> outbox.Delivery:
    """The delivery that the path names, if this identity may see it; otherwise there is none."""
    identity.require(Scope.READ)
    name = request.match_info["delivery"]
    if _ID.fullmatch(name):
        found = await gateway.client.run(gateway.deliveries.show, name)
        if identity.sees_all or found.key_id == _key_id(identity):
            return found
    raise DeliveryNotFound(f"no delivery {name[:120]!r}: the id is wrong, or it is no longer kept")


async def _find_to_change(request: web.Request, gateway: Gateway, identity: Identity) -> outbox.Delivery:
    found = await _find(request, gateway, identity)
    if found.key_id != _key_id(identity):
        identity.require(Scope.ADMIN)
    identity.require(Scope.SUBMIT)
    await _spend(gateway, identity)
    return found


async def _spend(gateway: Gateway, identity: Identity) -> None:
    """Counts in the key's rate: it makes the courier call someone, as often as it is asked for."""
    if identity.key is not None:
        await gateway.client.run(gateway.throttle.spend, identity.key)


async def _object(request: web.Request, gateway: Gateway, *needed: str) -> dict[str, Any]:
    """The JSON object of the body; what is `needed` of it is text."""
    body = await small_json(request, gateway.own)
    if not isinstance(body, dict) or not all(isinstance(body.get(name), str) for name in needed):
        form = json.dumps(dict.fromkeys(needed, "…"), ensure_ascii=False)
        raise BadRequest(f"the body is not JSON of the form {form}")
    return body


def _page(found: Iterable[outbox.Delivery], identity: Identity, *, cursor: str | None) -> web.Response:
    shown = [show_delivery(item, identity) for item in found]
    return json_response(DeliveryPage(deliveries=shown, next_cursor=cursor), headers=_NO_STORE)


def _answer(
    found: outbox.Delivery, identity: Identity, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    shown: Delivery = show_delivery(found, identity)
    return json_response(shown, status=status, headers=_NO_STORE | (headers or {}))


def _shown(secret: StoredSecret) -> WebhookSecret:
    return WebhookSecret(
        id=secret.id,
        added_at=time_of(secret.made_ms),
        valid_until=time_of(secret.until_ms) if secret.until_ms else None,
    )


def _key_id(identity: Identity) -> str | None:
    return None if identity.key is None else identity.key.id
