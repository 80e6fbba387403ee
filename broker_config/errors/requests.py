"""HTTP requests that the gateway refuses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from broker_config.errors.base import LatentqError


class RequestError(LatentqError, code="request_error"):
    """The gateway refused the request."""

    #: What the answer says besides, by name.
    more: Mapping[str, Any] = MappingProxyType({})


class BadRequest(RequestError, code="bad_request"):
    """The request cannot be read."""


class RouteNotFound(RequestError, code="route_not_found"):
    """The gateway has nothing at this path; /docs lists what there is."""


class MethodNotAllowed(RequestError, code="method_not_allowed"):
    """This path does not take this method; /docs lists what there is."""


class MediaTypeUnsupported(RequestError, code="media_type_unsupported"):
    """The body is of a kind that is not taken here."""


class RangeNotSatisfiable(RequestError, code="range_not_satisfiable"):
    """The range lies outside of the output."""


class NotAuthenticated(RequestError, code="not_authenticated"):
    """No key was given, or it is unknown or revoked: send `Authorization: Bearer KEY`."""


class NotAllowed(RequestError, code="not_allowed"):
    """The key may not do this, or the request comes from another site's page."""


class WrongHost(RequestError, code="wrong_host"):
    """The Host header is not one of this gateway's names: add it to LATENTQ_GATEWAY_ALLOWED_HOSTS."""


class LinkInvalid(RequestError, code="link_invalid"):
    """The link's signature is not valid for this; ask whoever gave it to you for a new one."""


class LinkExpired(RequestError, code="link_expired"):
    """The link has expired; ask whoever gave it to you for a new one."""


class LengthRequired(RequestError, code="length_required"):
    """The request does not say how long its body is: send Content-Length."""


class BodyTooLarge(RequestError, code="body_too_large"):
    """The body is larger than what is taken here."""


class QueryTooLong(RequestError, code="query_too_long"):
    """The query string is longer than what is taken here."""


class UploadTooSlow(RequestError, code="upload_too_slow", retryable=True):
    """The body came too slowly."""


class TryLater(RequestError, code="try_later", retryable=True):
    """The same request may be taken later."""

    def __init__(self, message: str | None = None, /, *, retry_after_s: float) -> None:
        super().__init__(message)
        #: When it is worth trying again, in seconds.
        self.retry_after_s = retry_after_s


class RateLimited(TryLater, code="rate_limited"):
    """The key asks more often than its rate allows."""


class QuotaExceeded(TryLater, code="quota_exceeded"):
    """The key has used up its jobs of the day."""


class GatewayBusy(TryLater, code="gateway_busy"):
    """The gateway does as much as it may at a time; try again."""


class InternalError(RequestError, code="internal_error", retryable=True):
    """The gateway met an error it does not know; its log has more."""
