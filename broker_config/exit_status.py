"""What a process ends with, so that whoever keeps it running knows whether to start it again."""

from __future__ import annotations

from typing import Final

from broker_config.errors import LatentqError

#: It cannot work as configured: starting it again would not help.
EXIT_UNUSABLE: Final = 2
#: It broke, its device for one: a new process may be sound (EX_SOFTWARE of sysexits.h).
EXIT_BROKEN: Final = 70
#: Starting it later may help (EX_TEMPFAIL of sysexits.h).
EXIT_AWAY: Final = 75


def exit_status(error: LatentqError) -> int:
    """The status of a service that `error` ended."""
    return EXIT_AWAY if error.retryable else EXIT_UNUSABLE
