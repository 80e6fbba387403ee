"""Browsers that logged in: a cookie with a random token, its digest in the broker, and a CSRF token beside it."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from typing import Any, Final

from broker_config import keys
from broker_config.connection import Connections, broker_errors
from broker_config.scripts import source
from producer.gateway.api_keys import ApiKey, ApiKeys
from producer.gateway.settings import GatewaySettings

COOKIE: Final = "latentq_session"
#: Of one key that hold: whoever has it could fill the broker with them.
MOST_SESSIONS: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BrowserSession:
    """A session that holds."""

    key: ApiKey
    csrf: str


class Sessions:
    """The sessions of one broker; any gateway knows those of the others."""

    def __init__(self, connections: Connections, api_keys: ApiKeys, settings: GatewaySettings) -> None:
        self._connections = connections
        self._keys = api_keys
        self._lifetime_s = round(settings.session_s)
        self._log_in: Any = connections.commands.register_script(source("log_in"))

    def begin(self, key: ApiKey) -> tuple[str, BrowserSession]:
        """A new session of `key`: the cookie's value, and the session. Of too many the key's oldest one ends."""
        token, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        stored = json.dumps({"key": key.id, "csrf": csrf})
        with broker_errors(self._connections.url):
            self._log_in(args=(key.id, _digest(token), stored, self._lifetime_s, MOST_SESSIONS))
        return token, BrowserSession(key=key, csrf=csrf)

    def find(self, token: str) -> BrowserSession | None:
        """The session of a cookie; None: there is none, or its key was revoked."""
        with broker_errors(self._connections.url):
            raw = self._connections.commands.get(keys.session(_digest(token)))
        if raw is None:
            return None
        stored = json.loads(raw)
        key = self._keys.get(stored["key"])
        return None if key is None else BrowserSession(key=key, csrf=stored["csrf"])

    def end(self, token: str) -> None:
        """Forgets a session."""
        digest, client = _digest(token), self._connections.commands
        with broker_errors(self._connections.url):
            raw = client.get(keys.session(digest))
            if raw is not None:
                client.delete(keys.session(digest))
                client.zrem(keys.sessions(json.loads(raw)["key"]), digest)


def _digest(token: str) -> str:
    # The token is the key's name in the broker, so whoever reads the broker's keys must not get it.
    # A cookie is whatever a client sends: a byte that is no UTF-8 comes as half a character.
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()
