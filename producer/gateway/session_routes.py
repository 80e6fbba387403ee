"""`/session`: the status page logs in with a key and gets a cookie."""

from __future__ import annotations

from aiohttp import web

from broker_config.errors import BadRequest, NotAuthenticated
from producer.gateway import jobs
from producer.gateway.context import GATEWAY, Gateway
from producer.gateway.identity import Identity
from producer.gateway.query import only
from producer.gateway.schemas import Session
from producer.gateway.sessions import COOKIE
from producer.gateway.streams import json_response
from producer.gateway.uploads import small_json


async def begin(request: web.Request) -> web.StreamResponse:
    """`POST /session` with `{"token": KEY}`: sets the cookie."""
    gateway = request.app[GATEWAY]
    only(request.query)
    body = await small_json(request, gateway.own)
    if not isinstance(body, dict) or "token" not in body:
        raise BadRequest('the body is not JSON of the form {"token": "lq_…"}')
    token = body["token"]
    key = await gateway.client.run(gateway.keys.of_token, token) if isinstance(token, str) else None
    if key is None:
        raise NotAuthenticated("this key is unknown or revoked")
    value, session = await gateway.client.run(gateway.sessions.begin, key)
    response = json_response(_shown(gateway, Identity(key=key, via="session", csrf=session.csrf)))
    response.set_cookie(
        COOKIE,
        value,
        max_age=round(gateway.own.session_s),
        httponly=True,
        samesite="Strict",
        secure=request.secure or gateway.reach.has_tls,
    )
    return response


async def show(request: web.Request) -> web.StreamResponse:
    """`GET /session`: who asks, and the CSRF token of a session."""
    gateway, identity = jobs.context(request)
    only(request.query)
    return json_response(_shown(gateway, identity), headers={"Cache-Control": "no-store"})


async def end(request: web.Request) -> web.StreamResponse:
    """`DELETE /session`: forgets it."""
    gateway, _ = jobs.context(request)
    only(request.query)
    token = request.cookies.get(COOKIE)
    if token is not None:
        await gateway.client.run(gateway.sessions.end, token)
    response = web.Response(status=204)
    response.del_cookie(COOKIE)
    return response


def _shown(gateway: Gateway, identity: Identity) -> Session:
    return Session(
        name=identity.key.name if identity.key is not None else "this machine",
        scopes=sorted(identity.granted),
        csrf=identity.csrf,
        needs_key=gateway.reach.needs_key,
    )
