"""What every request goes through, outermost first: headers of safety, errors to answers, counting, admittance."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from broker_config.errors import (
    BadRequest,
    InternalError,
    LatentqError,
    MethodNotAllowed,
    QueryTooLong,
    RouteNotFound,
)
from broker_config.link_signing import SIGNATURE
from producer.gateway.admittance import check_origin, identify, identify_link
from producer.gateway.context import GATEWAY, IDENTITY
from producer.gateway.error_responses import as_told, problem_response

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
#: Set on routes that answer without asking who asks, and on those that answer whoever has a signed link.
OPEN: Final = "__latentq_open__"
LINKED: Final = "__latentq_linked__"
#: Ours have 150 bytes at most.
_LONGEST_PATH: Final = 2048
#: Nothing from elsewhere, nothing inline, nobody may frame us. `blob:` is a picture that was just made.
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_SAFE_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": _PAGE_POLICY,
}


async def add_safe_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Sent with every answer, also with those of handlers that begin to write themselves."""
    set_safe_headers(response)


def set_safe_headers(response: web.StreamResponse) -> None:
    """What every answer has, also one to what is no request."""
    for name, value in _SAFE_HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["Server"] = "latentq"


@web.middleware
async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts requests and their time, by the route's template, never by the path that was asked for."""
    began = time.monotonic()
    status = 499  # the client went away
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "none"
        method = request.method if request.method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS") else "other"
        metrics = request.app[GATEWAY].metrics
        metrics.requests.labels(route, method, str(status)).inc()
        metrics.seconds.labels(route).observe(time.monotonic() - began)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns whatever goes wrong into a problem document."""
    try:
        return await handler(request)
    except LatentqError as error:
        return _refused(request, error)
    except web.HTTPNotFound:
        return _refused(request, RouteNotFound(f"nothing is at {request.path[:200]!r}; /docs lists what there is"))
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        refusal = _refused(request, MethodNotAllowed(f"{request.method[:20]} is not taken here, but {allowed}"))
        refusal.headers["Allow"] = allowed
        return refusal
    except web.HTTPException as error:
        return _refused(request, BadRequest(f"the request cannot be served: {error.reason}"))
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        logger.error("%s %s broke", request.method, request.path, exc_info=True, extra={"action": "request_broke"})
        return _refused(request, InternalError())


@web.middleware
async def admit(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Lets in who may come in."""
    gateway = request.app[GATEWAY]
    path, _, query = request.raw_path.partition("?")
    if len(query) > gateway.own.max_query_bytes or len(path) > _LONGEST_PATH:
        raise QueryTooLong(
            f"the path has {len(path)} bytes and the query {len(query)}, at most {_LONGEST_PATH} and "
            f"{gateway.own.max_query_bytes} are taken"
        )
    linked = SIGNATURE in request.query and hasattr(request.match_info.handler, LINKED)
    check_origin(request, gateway.reach, linked=linked)
    if linked:
        request[IDENTITY] = identify_link(request, gateway)
    elif not hasattr(request.match_info.handler, OPEN):
        request[IDENTITY] = await identify(request, gateway)
    return await handler(request)


def _refused(request: web.Request, error: LatentqError) -> web.Response:
    """The answer to an error."""
    if request.writer.output_size > 0:  # an answer has begun: it cannot become another one
        raise ConnectionResetError("the answer broke off") from error
    response = problem_response(as_told(error, request.get(IDENTITY)), request)
    # What was not read of a body must not be taken for the next request.
    if request.can_read_body and not request.content.at_eof():
        response.force_close()
    return response
