"""HTTP requests that the gateway refuses."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class RequestError(LatentqError):
    """The gateway refused the request."""

    code = "request_error"


class BadRequest(RequestError):
    """The request cannot be read."""

    code = "bad_request"


class RouteNotFound(RequestError):
    """The gateway has nothing at this path; /docs lists what there is."""

    code = "route_not_found"


class MethodNotAllowed(RequestError):
    """This path does not take this method; /docs lists what there is."""

    code = "method_not_allowed"


class MediaTypeUnsupported(RequestError):
    """The body is of a kind that is not taken here."""

    code = "media_type_unsupported"


class RangeNotSatisfiable(RequestError):
    """The range lies outside of the output."""

    code = "range_not_satisfiable"


class NotAuthenticated(RequestError):
    """No key was given, or it is unknown or revoked: send `Authorization: Bearer KEY`."""

    code = "not_authenticated"


class NotAllowed(RequestError):
    """The key may not do this, or the request comes from another site's page."""

    code = "not_allowed"


class WrongHost(RequestError):
    """The Host header is not one of this gateway's names: add it to LATENTQ_GATEWAY_ALLOWED_HOSTS."""

    code = "wrong_host"


class LinkInvalid(RequestError):
    """The link's signature is not valid for this; ask whoever gave it to you for a new one."""

    code = "link_invalid"


class LinkExpired(RequestError):
    """The link has expired; ask whoever gave it to you for a new one."""

    code = "link_expired"


class LengthRequired(RequestError):
    """The request does not say how long its body is: send Content-Length."""

    code = "length_required"


class BodyTooLarge(RequestError):
    """The body is larger than what is taken here."""

    code = "body_too_large"


class QueryTooLong(RequestError):
    """The query string is longer than what is taken here."""

    code = "query_too_long"


class UploadTooSlow(RequestError):
    """The body came too slowly."""

    code = "upload_too_slow"
    retryable = True


class TryLater(RequestError):
    """The same request may be taken later."""

    code = "try_later"
    retryable = True

    def __init__(self, message: str | None = None, /, *, retry_after_s: float) -> None:
        super().__init__(message)
        #: When it is worth trying again, in seconds.
        self.retry_after_s = retry_after_s


class RateLimited(TryLater):
    """The key asks more often than its rate allows."""

    code = "rate_limited"


class QuotaExceeded(TryLater):
    """The key has used up its jobs of the day."""

    code = "quota_exceeded"


class GatewayBusy(TryLater):
    """The gateway does as much as it may at a time; try again."""

    code = "gateway_busy"


class InternalError(RequestError):
    """The gateway met an error it does not know; its log has more."""

    code = "internal_error"
    retryable = True
