"""What the process of a service ends with when it cannot start, so that its supervisor knows whether to try again."""

from __future__ import annotations

from typing import Final

from broker_config.errors import LatentqError

#: It cannot work as configured: starting it again would not help.
EXIT_UNUSABLE: Final = 2
#: Starting it later may help (EX_TEMPFAIL of sysexits.h).
EXIT_AWAY: Final = 75


def exit_status(error: LatentqError) -> int:
    """The status of a service that `error` ended."""
    return EXIT_AWAY if error.retryable else EXIT_UNUSABLE
