"""How often a key may submit, and how much a day: counted in the broker, so that it holds over all gateways."""

from __future__ import annotations

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
    """Lets keys submit at their rate."""

    def __init__(self, connections: Connections, settings: GatewaySettings) -> None:
        self._connections = connections
        self._settings = settings
        self._script: Any = connections.commands.register_script(source("spend"))

    def spend(self, key: ApiKey, jobs: int = 1) -> None:
        """Counts `jobs` submits of `key`.

        Raises:
            RateLimited, QuotaExceeded: too many; carries when to come back.
        """
        rate = key.rate_per_min or self._settings.rate_per_min
        limit = key.jobs_per_day or self._settings.jobs_per_day or 0
        burst = max(_SMALLEST_BURST, int(rate * _BURST_S / 60))
        with broker_errors(self._connections.url):
            answer = self._script(args=[key.id, round(60e6 / rate), burst, jobs, limit])
        word = answer[0].decode()
        if word == "ok":
            return
        wait_s = int(answer[1]) / 1e6
        if word == "quota":
            raise QuotaExceeded(f"this key may submit {limit} jobs a day (UTC): come back then", retry_after_s=wait_s)
        raise RateLimited(
            f"this key may submit {rate:g} jobs a minute: come back in {wait_s:.1f} s", retry_after_s=wait_s
        )
