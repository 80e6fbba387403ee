"""Links to a job's outputs that work without a key, until they expire.

A link is `PUBLIC_URL/v1/decodes/ID/output/N?expires=SECONDS&signature=…`. The signature is an HMAC-SHA256 over the
method, the path and the expiry, so that a link opens one output for reading and nothing else. Whoever holds a key can
make links and nobody else can, so nothing is stored for them; they end by time, by the job's retention, or with the key
that made them. Several keys are accepted during a rotation; the first one signs.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote, urlencode

from broker_config.errors import ConfigurationError, LinkExpired, LinkInvalid

#: Query parameters of a link.
EXPIRES: Final = "expires"
SIGNATURE: Final = "signature"
#: In front of what is signed, so that a signature made for something else with the same key is none here.
_CONTEXT: Final = "latentq-link-1"
_DIGITS: Final = frozenset("0123456789")
#: The year 33658 has 12 digits.
_MOST_DIGITS: Final = 12


def output_path(job_id: str, number: int) -> str:
    """Path of one output. `job_id`: the broker's, which begins with the key's id where a key submitted the job."""
    return f"/v1/decodes/{quote(job_id, safe='')}/output/{number}"


class LinkSigner:
    """Makes links and checks them."""

    def __init__(self, keys: Sequence[str], public_url: str) -> None:
        """Args:
        keys: secrets of at least 128 bits, the newest first.
        public_url: where others reach the gateway.

        Raises:
            ConfigurationError: there is no key.
        """
        if not keys or not all(keys):
            raise ConfigurationError("links cannot be signed without a key: set LATENTQ_LINK_KEY")
        self._keys = tuple(key.encode() for key in keys)
        self._public_url = public_url.rstrip("/")

    def output_url(self, job_id: str, number: int, *, expires_s: int) -> str:
        """A link to one output.

        Args:
            job_id: the broker's id of the job.
            number: which output, from 0.
            expires_s: when the link ends, in seconds since the epoch.
        """
        path = output_path(job_id, number)
        signature = _signature(self._keys[0], path, str(expires_s))
        return f"{self._public_url}{path}?{urlencode({EXPIRES: expires_s, SIGNATURE: signature})}"

    def check(self, path: str, *, expires: str, signature: str, now_s: float | None = None) -> None:
        """Raises if a link does not open `path`.

        Args:
            path: what is asked for, as it came.
            expires: the link's expiry.
            signature: the link's signature.
            now_s: seconds since the epoch; None: now.

        Raises:
            LinkInvalid: no key of ours made it, for this.
            LinkExpired: its time is over.
        """
        # Each key is tried, whether or not one before it fits, so that the time says nothing.
        given = signature.encode(errors="replace")
        fits = [hmac.compare_digest(_signature(key, path, expires).encode(), given) for key in self._keys]
        if not any(fits) or not 0 < len(expires) <= _MOST_DIGITS or not _DIGITS.issuperset(expires):
            raise LinkInvalid()
        if int(expires) <= (time.time() if now_s is None else now_s):
            raise LinkExpired()


def _signature(key: bytes, path: str, expires: str) -> str:
    signed = "\n".join((_CONTEXT, "GET", path, expires)).encode(errors="replace")
    return base64.urlsafe_b64encode(hmac.digest(key, signed, hashlib.sha256)).decode().rstrip("=")
