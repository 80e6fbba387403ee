"""The status page, the page of the API, and their files: read once, served with a digest as ETag."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib import resources
from typing import Final

from aiohttp import web

from broker_config.errors import RouteNotFound

_TYPES: Final = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}


@cache
def files() -> dict[str, bytes]:
    """Every file of the folder `static`, by name."""
    folder = resources.files(__package__) / "static"
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.name.rpartition(".")[2] in _TYPES}


async def status(request: web.Request) -> web.StreamResponse:
    """`GET /`."""
    return _file(request, "status.html")


async def docs(request: web.Request) -> web.StreamResponse:
    """`GET /docs`."""
    return _file(request, "docs.html")


async def static(request: web.Request) -> web.StreamResponse:
    """`GET /static/{name}`."""
    return _file(request, request.match_info["name"])


async def openapi(request: web.Request) -> web.StreamResponse:
    """`GET /openapi.json`."""
    return _answer(request, _document(), "application/json")


@cache
def _document() -> bytes:
    from producer.gateway.openapi import document  # it is made of the table of routes, which names this module

    return json.dumps(document()).encode()


def _file(request: web.Request, name: str) -> web.Response:
    data = files().get(name)
    if data is None:
        raise RouteNotFound(f"there is no file {name[:80]!r}")
    return _answer(request, data, _TYPES[name.rpartition(".")[2]])


def _answer(request: web.Request, data: bytes, content_type: str) -> web.Response:
    etag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if request.headers.get("If-None-Match") == etag:
        return web.Response(status=304, headers=headers)
    charset = None if content_type == "application/json" else "utf-8"
    return web.Response(body=data, content_type=content_type, charset=charset, headers=headers)
