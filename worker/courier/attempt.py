"""One attempt: signed, sent, judged. What the receiver says beyond its status is read, up to a limit, and forgotten."""

from __future__ import annotations

import asyncio
import email.utils
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

import aiohttp
from standardwebhooks import Webhook as Signer

from broker_config.errors import WebhookUrlRefused
from broker_config.receiver_url import ReceiverUrl
from broker_config.webhook_outbox import Attempt, DueDelivery
from worker.courier.guarded_connector import guarded_post

_PIECE_BYTES: Final = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What an attempt came to."""

    word: Literal["delivered", "failed", "stopped"]
    attempt: Attempt
    #: Whether the receiver answered; None: it was not asked.
    answered: bool | None
    #: What it asked for.
    retry_after_s: float | None = None


def signed_headers(delivery_id: str, body: str, secrets: Sequence[str], *, now_s: float) -> dict[str, str]:
    """Headers of a message, with one signature for each secret, as Standard Webhooks has them."""
    at = datetime.fromtimestamp(int(now_s), UTC)
    return {
        "Content-Type": "application/json",
        "webhook-id": delivery_id,
        "webhook-timestamp": str(int(now_s)),
        "webhook-signature": " ".join(Signer(secret).sign(delivery_id, at, body) for secret in secrets),
    }


class Sender:
    """Sends messages through one guarded session."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        timeout_s: float,
        max_answer_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args:
        session: of `guarded_session`.
        timeout_s: longest time of an attempt.
        max_answer_bytes: how much of an answer is read.
        clock: seconds since the epoch; receivers compare the signed time with their own.
        """
        self._session = session
        self._timeout_s = timeout_s
        self._max_answer_bytes = max_answer_bytes
        self._clock = clock

    async def send(self, due: DueDelivery, body: str, secrets: Sequence[str]) -> Verdict:
        """One attempt. Never raises but when it is canceled."""
        if not secrets:
            return self._failed(due, "there is no secret to sign it with any more", answered=None)
        headers = signed_headers(due.id, body, secrets, now_s=self._clock())
        started = time.monotonic()
        status: int | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                url = ReceiverUrl.parse(due.url)
                async with guarded_post(self._session, url, body=body.encode(), headers=headers) as response:
                    status = response.status
                    answer = response.headers.copy()
                    await self._read_some(response)
        except WebhookUrlRefused as error:
            return self._failed(due, error.code, answered=None, started=started)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            reason, answered = self._reason(error)
            return self._failed(due, reason, status=status, answered=answered, started=started)
        return self._judged(due, status, answer, started=started)

    async def _read_some(self, response: aiohttp.ClientResponse) -> None:
        """Reads an answer, so that its connection can be used again; one that is too long is cut off."""
        left = self._max_answer_bytes
        while left > 0:
            piece = await response.content.read(min(left, _PIECE_BYTES))
            if not piece:
                return
            left -= len(piece)
        response.close()

    def _judged(self, due: DueDelivery, status: int, headers: Mapping[str, str], *, started: float) -> Verdict:
        if 200 <= status < 300:
            return Verdict(word="delivered", attempt=self._attempt(due, status, "", started=started), answered=True)
        if status == 410:
            return Verdict(
                word="stopped",
                attempt=self._attempt(due, status, "gone: this endpoint wants no more", started=started),
                answered=True,
            )
        what = "a redirect, which is not followed" if 300 <= status < 400 else "not 2xx"
        return self._failed(
            due,
            what,
            status=status,
            answered=True,
            started=started,
            retry_after_s=_retry_after_s(headers.get("Retry-After"), now_s=self._clock()),
        )

    def _reason(self, error: Exception) -> tuple[str, bool]:
        """Why there is no usable answer, in words of ours, and whether the receiver said anything at all."""
        if isinstance(error, TimeoutError):
            return f"no whole answer within {self._timeout_s:g} s", False
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return "its name could not be resolved", False
        if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError):
            return "its certificate is not valid", False
        if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
            return "no TLS connection could be made", False
        if isinstance(error, aiohttp.ClientConnectorError):
            number = error.os_error.errno
            return f"not reachable ({'no connection' if number is None else os.strerror(number)})", False
        if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
            return "it closed the connection without an answer", False
        if isinstance(error, aiohttp.ClientPayloadError):
            return "it closed the connection before its answer was whole", True
        return "its answer is not HTTP", True

    def _failed(
        self,
        due: DueDelivery,
        error: str,
        *,
        answered: bool | None,
        status: int | None = None,
        started: float | None = None,
        retry_after_s: float | None = None,
    ) -> Verdict:
        attempt = self._attempt(due, status, error, started=started)
        return Verdict(word="failed", attempt=attempt, answered=answered, retry_after_s=retry_after_s)

    @staticmethod
    def _attempt(due: DueDelivery, status: int | None, error: str, *, started: float | None) -> Attempt:
        took_s = 0.0 if started is None else time.monotonic() - started
        return Attempt(at_ms=due.claimed_ms, status=status, duration_ms=round(took_s * 1000), error=error)


def _retry_after_s(value: str | None, *, now_s: float) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (RFC 9110, 10.2.3); None: it asks for none."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now_s)
    except (ValueError, TypeError, OverflowError):
        return None
