"""Keys of the gateway: made, found again by a token, listed, revoked.

A token is `lq_<id>_<secret>`: the id names the entry in the broker, the secret has 256 random bits, so that one SHA-256
is enough to store it (docs/decisions/0006-keys-in-the-broker.md). Every gateway of a broker knows the same keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from broker_config import keys
from broker_config.answers import time_ms
from broker_config.connection import Connections, broker_errors
from broker_config.errors import InvalidOption

_TOKEN = re.compile(r"lq_([a-z2-7]{8})_([A-Za-z0-9_-]{43})")
_NAME = re.compile(r"[\w .@-]{1,64}")
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
#: Compared with when there is no such key, so that the answer takes as long.
_NOBODY: Final = hashlib.sha256(b"").hexdigest()


class Scope(StrEnum):
    """What a key may do."""

    #: Submit jobs, cancel and delete its own.
    SUBMIT = "submit"
    #: See its own jobs and their outputs, and the queues.
    READ = "read"
    #: See everyone's jobs, workers and metrics.
    READ_ALL = "read_all"
    #: Everything, on everyone's jobs.
    ADMIN = "admin"


#: What a scope includes besides itself.
INCLUDED: Final[dict[Scope, frozenset[Scope]]] = {
    Scope.SUBMIT: frozenset(),
    Scope.READ: frozenset(),
    Scope.READ_ALL: frozenset({Scope.READ}),
    Scope.ADMIN: frozenset(Scope),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """One key, without its secret."""

    #: Eight characters; also in the names of its jobs.
    id: str
    name: str
    scopes: tuple[Scope, ...]
    #: Submits a minute; None: the setting.
    rate_per_min: float | None = None
    #: Jobs a day; None: the setting.
    jobs_per_day: int | None = None
    created_ms: int = 0
    revoked_ms: int = 0

    @property
    def granted(self) -> frozenset[Scope]:
        """Every scope it has, directly or by another."""
        return frozenset(self.scopes).union(*(INCLUDED[scope] for scope in self.scopes))


class ApiKeys:
    """The keys of one broker."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def add(
        self, name: str, scopes: list[Scope], *, rate_per_min: float | None = None, jobs_per_day: int | None = None
    ) -> tuple[ApiKey, str]:
        """A new key and its token, which is stored nowhere.

        Raises:
            InvalidOption: a name that is not one, or no scope.
        """
        if not _NAME.fullmatch(name):
            raise InvalidOption("the name of a key is 1 to 64 letters, digits, spaces and . @ _ -", field="name")
        if not scopes:
            raise InvalidOption(f"a key needs a scope: {', '.join(Scope)}", field="scope")
        secret = secrets.token_urlsafe(32)
        client = self._connections.commands
        with broker_errors(self._connections.url):
            while True:
                key_id = "".join(secrets.choice(_ALPHABET) for _ in range(8))
                key = ApiKey(
                    id=key_id,
                    name=name,
                    scopes=tuple(sorted(set(scopes))),
                    rate_per_min=rate_per_min,
                    jobs_per_day=jobs_per_day,
                    created_ms=time_ms(client.time()),
                )
                entry = asdict(key) | {"digest": hashlib.sha256(secret.encode()).hexdigest()}
                if client.hsetnx(keys.API_KEYS, key_id, json.dumps(entry)):
                    return key, f"lq_{key_id}_{secret}"

    def of_token(self, token: str) -> ApiKey | None:
        """The key that `token` belongs to; None: there is none, or it was revoked."""
        match = _TOKEN.fullmatch(token)
        entry = self._entry(match[1]) if match else None
        digest = hashlib.sha256((match[2] if match else "").encode()).hexdigest()
        same = hmac.compare_digest(digest, str(entry["digest"]) if entry else _NOBODY)
        key = _key(entry) if entry and same and match else None
        return key if key is not None and not key.revoked_ms else None

    def get(self, key_id: str) -> ApiKey | None:
        """The key with this id; None: there is none, or it was revoked."""
        entry = self._entry(key_id)
        key = _key(entry) if entry else None
        return key if key is not None and not key.revoked_ms else None

    def list(self) -> list[ApiKey]:
        """Every key, revoked ones included, oldest first."""
        with broker_errors(self._connections.url):
            entries = self._connections.commands.hvals(keys.API_KEYS)
        found = [_key(json.loads(entry)) for entry in entries]
        return sorted(found, key=lambda key: (key.created_ms, key.id))

    def revoke(self, key_id: str) -> ApiKey:
        """Ends a key for good; its jobs stay its own. Gateways notice within two seconds.

        Raises:
            InvalidOption: no such key.
        """
        entry = self._entry(key_id)
        if entry is None:
            raise InvalidOption(f"no key {key_id!r}; `latentq keys list` has them", field="key")
        with broker_errors(self._connections.url):
            if not entry["revoked_ms"]:
                entry["revoked_ms"] = time_ms(self._connections.commands.time())
                self._connections.commands.hset(keys.API_KEYS, key_id, json.dumps(entry))
        return _key(entry)

    def _entry(self, key_id: str) -> dict[str, Any] | None:
        with broker_errors(self._connections.url):
            raw = self._connections.commands.hget(keys.API_KEYS, key_id)
        return None if raw is None else dict(json.loads(raw))


def _key(entry: dict[str, Any]) -> ApiKey:
    known = {name: value for name, value in entry.items() if name in ApiKey.__dataclass_fields__}
    known["scopes"] = tuple(Scope(scope) for scope in entry["scopes"])
    return ApiKey(**known)
