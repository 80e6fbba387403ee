"""How often a key may submit, how much a day, and the list of what it did: in the broker, for all gateways.

DESIGN. The rate is charged for asking, the day for jobs: a replay of a job that is there, and a submit that is refused,
cost nothing of it. So the day is charged when everything but the broker's own answer is known (`enter`), and given
back when that is a refusal (`withdraw`). A job is charged by its id, so each call is safe to send again; and since two
submits may have one id, of which one is refused and the other accepted, what was accepted is entered once more.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

from broker_config.connection import Connections, broker_errors
from broker_config.errors import QuotaExceeded, RateLimited
from broker_config.scripts import source
from producer.gateway.api_keys import ApiKey
from producer.gateway.settings import GatewaySettings

#: Submits that may come at once: those of ten seconds, and never fewer than this.
_SMALLEST_BURST: Final = 5
_BURST_S: Final = 10.0


class Throttle:
    """Lets keys submit. Asks the broker: call it in a thread."""

    def __init__(self, connections: Connections, settings: GatewaySettings) -> None:
        self._connections = connections
        self._settings = settings
        register = connections.commands.register_script
        self._scripts: dict[str, Any] = {name: register(source(name)) for name in ("spend", "enter", "withdraw")}

    def spend(self, key: ApiKey, job_id: str | None = None) -> None:
        """Counts a submit of `key`; without a job, something else that costs as much, which has no part in the day.

        Raises:
            RateLimited, QuotaExceeded: too many; carries when to come back.
        """
        rate = key.rate_per_min or self._settings.rate_per_min
        burst = max(_SMALLEST_BURST, int(rate * _BURST_S / 60))
        per_day = 0 if job_id is None else self._per_day(key)
        answer = self._run("spend", key.id, round(60e6 / rate), burst, per_day, job_id or "", uuid.uuid4().hex)
        if answer[0] == b"rate":
            wait_s = int(answer[1]) / 1e6
            raise RateLimited(
                f"this key may submit {rate:g} jobs a minute: come back in {wait_s:.1f} s", retry_after_s=wait_s
            )
        self._check_quota(key, answer)

    def enter(self, key: ApiKey, job_id: str, *, kept_s: float, accepted: bool = False) -> None:
        """Puts a job on the list of `key`, which is kept for `kept_s`, and counts it among those of the day.

        Args:
            key: whose it is.
            job_id: the job.
            kept_s: how long the list is kept.
            accepted: it is there by now, so it is entered whatever else is.

        Raises:
            QuotaExceeded: too many.
        """
        kept_ms = round(kept_s * 1000)
        answer = self._run("enter", key.id, job_id, self._per_day(key), kept_ms, "1" if accepted else "")
        self._check_quota(key, answer)

    def withdraw(self, key: ApiKey, job_id: str) -> None:
        """Lists and counts a job no longer that was refused."""
        self._run("withdraw", key.id, job_id)

    def _run(self, name: str, *args: str | int) -> Any:
        with broker_errors(self._connections.url):
            return self._scripts[name](args=args)

    def _per_day(self, key: ApiKey) -> int:
        return key.jobs_per_day or self._settings.jobs_per_day or 0

    def _check_quota(self, key: ApiKey, answer: Any) -> None:
        if answer[0] == b"quota":
            raise QuotaExceeded(
                f"this key may submit {self._per_day(key)} jobs a day (UTC): come back then",
                retry_after_s=int(answer[1]) / 1e6,
            )
