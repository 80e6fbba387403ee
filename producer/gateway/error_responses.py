"""Errors as answers: `application/problem+json` (RFC 9457) with our stable codes, never a stack trace.

The status follows from the class of the error, its nearest ancestor in the table deciding. diffusers' client shows the
JSON of whatever is not 2xx to its user, so every answer that is an error has a JSON body.
"""

from __future__ import annotations

import json
import logging
import math
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web

from broker_config import errors
from broker_config.errors import LatentqError
from producer.gateway.identity import Identity

logger = logging.getLogger(__name__)

PROBLEM_JSON: Final = "application/problem+json"
#: When it is worth trying again after an outage of the broker, in seconds.
_OUTAGE_RETRY_S: Final = 5

#: What is told of these in the class's words alone.
_INTERNAL: Final = (errors.BrokerError, errors.ConfigurationError, errors.BlobError)

_STATUS: Final[dict[type[LatentqError], HTTPStatus]] = {
    errors.LatentqError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.ConfigurationError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.BrokerError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.InvalidJob: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.NotSafetensors: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.LatentsTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.JobError: HTTPStatus.CONFLICT,
    errors.JobNotFound: HTTPStatus.NOT_FOUND,
    errors.ResultExpired: HTTPStatus.GONE,
    errors.JobFailed: HTTPStatus.BAD_GATEWAY,
    errors.WaitTimeout: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.DeliveryNotFound: HTTPStatus.NOT_FOUND,
    errors.BlobError: HTTPStatus.BAD_GATEWAY,
    errors.BlobMissing: HTTPStatus.GONE,
    errors.RequestError: HTTPStatus.BAD_REQUEST,
    errors.RouteNotFound: HTTPStatus.NOT_FOUND,
    errors.MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    errors.MediaTypeUnsupported: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.RangeNotSatisfiable: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    errors.NotAuthenticated: HTTPStatus.UNAUTHORIZED,
    errors.NotAllowed: HTTPStatus.FORBIDDEN,
    errors.WrongHost: HTTPStatus.MISDIRECTED_REQUEST,
    errors.LinkInvalid: HTTPStatus.FORBIDDEN,
    errors.LinkExpired: HTTPStatus.GONE,
    errors.LengthRequired: HTTPStatus.LENGTH_REQUIRED,
    errors.BodyTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.QueryTooLong: HTTPStatus.REQUEST_URI_TOO_LONG,
    errors.UploadTooSlow: HTTPStatus.REQUEST_TIMEOUT,
    errors.TryLater: HTTPStatus.TOO_MANY_REQUESTS,
    errors.GatewayBusy: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.InternalError: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def status_of(error: LatentqError | type[LatentqError]) -> HTTPStatus:
    """The HTTP status that an error is answered with."""
    kind = error if isinstance(error, type) else type(error)
    return next(_STATUS[ancestor] for ancestor in kind.__mro__ if ancestor in _STATUS)


def as_told(error: LatentqError, identity: Identity | None) -> LatentqError:
    """The error with the names that this one has for its jobs, in place of those of the broker."""
    if identity is not None and identity.key is not None:
        error.args = (error.message.replace(f"k_{identity.key.id}_", ""),)
        if error.job_id is not None:
            error.job_id = identity.shown(error.job_id)
    return error


def problem(error: LatentqError, *, instance: str) -> dict[str, Any]:
    """The body of the answer to an error. `instance`: path of the request."""
    status = status_of(error)
    wire = error.to_wire()
    title = (type(error).__doc__ or "").strip().splitlines()[0]
    if isinstance(error, _INTERNAL) and not isinstance(error, errors.QueueFull):
        # Where the broker and the stores are, and how to mend them, is for the log.
        logger.warning(
            "%s is answered with %s: %s", instance, error.code, error.message, extra={"action": "request_unserved"}
        )
        wire["message"] = title
    body: dict[str, Any] = {
        "type": f"urn:latentq:error:{error.code}",
        "title": title,
        "status": int(status),
        "detail": wire.pop("message"),
        "instance": instance,
        **wire,
    }
    if isinstance(error, errors.JobFailed):
        body["error_code"] = error.error_code
    if isinstance(error, errors.RequestError):
        body |= error.more
    # What cannot be written as UTF-8 came in as an escape in JSON, and goes out as one.
    body = {name: _printable(value) if isinstance(value, str) else value for name, value in body.items()}
    body["error"] = body["detail"]  # where the remote-VAE service had its message
    return body


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def problem_response(error: LatentqError, request: web.BaseRequest) -> web.Response:
    """The answer to an error."""
    status = status_of(error)
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None and status is HTTPStatus.SERVICE_UNAVAILABLE:
        retry_after_s = _OUTAGE_RETRY_S
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if status is HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = 'Bearer realm="latentq", Basic realm="latentq", charset="UTF-8"'
    return web.Response(
        status=status,
        body=json.dumps(problem(error, instance=request.path)).encode(),
        content_type=PROBLEM_JSON,
        headers=headers,
    )
