"""The secrets that sign webhooks: of one job, of a gateway's key, or of everyone else.

DESIGN. A set of secrets has an owner: `job:<id>`, `key:<key id>` or `default`, and lies under a key of its own that the
job's record only names. A message is signed with every secret of the set that is still valid, the newest first
(Standard Webhooks, "multiple signatures"), so that a receiver can change over at any time while both are there. Jobs
that came in with a gateway's key never fall back to `default`: whoever may submit with a key could otherwise have
messages signed, to any receiver, that look like someone else's.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from broker_config import keys
from broker_config.answers import time_ms
from broker_config.connection import Connections, broker_errors
from broker_config.errors import InvalidOption
from broker_config.scoped_ids import key_of

PREFIX: Final = "whsec_"
#: Of those we make. Standard Webhooks asks for 24 to 64.
_NEW_BYTES: Final = 32
_SECRET_BYTES: Final = range(24, 65)
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
#: As many signatures fit into a header that every server takes.
MAX_SECRETS: Final = 5
DEFAULT_OWNER: Final = "default"
#: How long a set that nobody uses stays.
UNUSED_S: Final = 400 * 86_400.0
#: How long the old secret goes on signing beside a new one, unless told otherwise.
OVERLAP_S: Final = 86_400.0
#: The longest it may: a year. A set that nobody uses is gone soon after.
LONGEST_OVERLAP_S: Final = 365 * 86_400.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookSecret:
    """One secret of a set."""

    #: Tells it from the others; shown, unlike the secret.
    id: str
    secret: str = field(repr=False)
    made_ms: int
    #: 0: for good.
    until_ms: int


def new_secret() -> str:
    """A secret that nobody had before."""
    return PREFIX + base64.b64encode(secrets.token_bytes(_NEW_BYTES)).decode()


def read_secrets(text: str, *, option: str = "webhook_secret") -> tuple[str, ...]:
    """One secret, or several separated by commas, the newest first.

    Raises:
        InvalidOption: it is none; the message does not repeat it.
    """
    found = tuple(part.strip() for part in text.split(",")) if isinstance(text, str) else ()
    if not 1 <= len(found) <= MAX_SECRETS or not all(_is_secret(part) for part in found):
        raise InvalidOption(
            f"{option} is no secret: it is {PREFIX} and the base64 of 24 to 64 random bytes, or up to {MAX_SECRETS} of "
            "them separated by commas",
            field=option,
        )
    return found


def _is_secret(text: str) -> bool:
    encoded = text.removeprefix(PREFIX)
    if not text.startswith(PREFIX) or not _BASE64.fullmatch(encoded):
        return False
    try:
        return len(base64.b64decode(encoded, validate=True)) in _SECRET_BYTES
    except binascii.Error:
        return False


def owner_of(job_id: str, *, own: bool) -> str:
    """Whose secrets sign a job's webhooks. `own`: it brings some of its own."""
    if own:
        return f"job:{job_id}"
    key_id = key_of(job_id)
    return DEFAULT_OWNER if key_id is None else owner_of_key(key_id)


def owner_of_key(key_id: str | None) -> str:
    """Whose secrets sign what a gateway's key submits; None: what comes in without one."""
    return DEFAULT_OWNER if key_id is None else f"key:{key_id}"


def entries_of(given: Sequence[str]) -> str:
    """A job's own secrets as `submit` stores them; empty: it has none."""
    if not given:
        return ""
    return json.dumps([json.dumps({"secret": secret, "made_ms": 0, "until_ms": 0}) for secret in given])


class WebhookSecrets:
    """The sets of secrets of one broker."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def add(self, owner: str, secret: str, *, overlap_s: float = OVERLAP_S) -> WebhookSecret:
        """Adds a secret; those that were there go on signing for `overlap_s`.

        Raises:
            InvalidOption: it is none, the set is full, or `overlap_s` is not from 0 to `LONGEST_OVERLAP_S`.
        """
        read_secrets(secret)
        if not 0 <= overlap_s <= LONGEST_OVERLAP_S:
            raise InvalidOption(
                f"overlap_s is {overlap_s:g}, expected seconds from 0 to {LONGEST_OVERLAP_S:.0f}, a year",
                field="overlap_s",
            )
        name, client = keys.webhook_secret(owner), self._connections.commands
        now_ms = self._now_ms()
        valid = self.of(owner)
        if len(valid) >= MAX_SECRETS:
            raise InvalidOption(f"{owner} has {MAX_SECRETS} valid secrets: remove one first", field="secret")
        # Later than every other, even of the same millisecond: the newest signs first.
        made_ms = max([now_ms, *(old.made_ms + 1 for old in valid)])
        made = WebhookSecret(id=secrets.token_hex(4), secret=secret, made_ms=made_ms, until_ms=0)
        ends_ms = now_ms + round(overlap_s * 1000)
        with broker_errors(self._connections.url), client.pipeline(transaction=True) as pipe:
            for old in valid:
                if old.until_ms == 0 or old.until_ms > ends_ms:
                    pipe.hset(name, old.id, _entry(old, until_ms=ends_ms))
            pipe.hset(name, made.id, _entry(made, until_ms=0))
            pipe.pexpire(name, round(UNUSED_S * 1000))
            pipe.execute()
        return made

    def of(self, owner: str) -> list[WebhookSecret]:
        """The valid secrets of a set, the newest first; forgets those whose time is over."""
        name, client = keys.webhook_secret(owner), self._connections.commands
        now_ms = self._now_ms()
        with broker_errors(self._connections.url):
            raw: Any = client.hgetall(name)
            found = [_secret(item.decode(), json.loads(entry)) for item, entry in raw.items()]
            over = [item.id for item in found if 0 < item.until_ms <= now_ms]
            if over:
                client.hdel(name, *over)
        return sorted((item for item in found if item.id not in over), key=lambda item: (-item.made_ms, item.id))

    def remove(self, owner: str, secret_id: str) -> bool:
        """Ends a secret at once. Returns whether it was there."""
        with broker_errors(self._connections.url):
            return bool(self._connections.commands.hdel(keys.webhook_secret(owner), secret_id))

    def _now_ms(self) -> int:
        with broker_errors(self._connections.url):
            return time_ms(self._connections.commands.time())


def _entry(item: WebhookSecret, *, until_ms: int) -> str:
    return json.dumps({"secret": item.secret, "made_ms": item.made_ms, "until_ms": until_ms})


def _secret(secret_id: str, entry: dict[str, Any]) -> WebhookSecret:
    return WebhookSecret(
        id=secret_id, secret=str(entry["secret"]), made_ms=int(entry["made_ms"]), until_ms=int(entry["until_ms"])
    )
