"""The faults of `faulty_proxy`, and the commands that each is for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

_BOUND_S: Final = 30.0


class Fault(Enum):
    """What may happen to a command."""

    #: The broker executes it, the client gets no reply: the connection is cut.
    SWALLOW_REPLY = "swallow_reply"
    #: The broker does not get it: the connection is cut.
    CUT_BEFORE = "cut_before"
    #: The broker executes it; reply and connection wait until released.
    HOLD_REPLY = "hold_reply"
    #: The broker gets it when released.
    HOLD = "hold"
    #: The broker gets it later.
    DELAY = "delay"


@dataclass(eq=False)
class Rule:
    """One fault, and the commands it is for. `wait` blocks until it has struck."""

    fault: Fault
    #: The n-th command that matches, counted from when the rule was made.
    nth: int = 1
    #: How many commands from the n-th on; None: all.
    times: int | None = 1
    #: Name of the command; None: any.
    command: str | None = None
    #: One of its arguments (a key, the sha1 of a script); None: any.
    argument: bytes | None = None
    delay_s: float = 0.0
    _seen: int = 0
    _struck: threading.Event = field(default_factory=threading.Event)
    _released: threading.Event = field(default_factory=threading.Event)

    def takes(self, name: str, arguments: list[bytes]) -> bool:
        """Counts a command; True if the fault is for this one."""
        if self.command not in (None, name) or (self.argument is not None and self.argument not in arguments):
            return False
        self._seen += 1
        return self._seen >= self.nth and (self.times is None or self._seen < self.nth + self.times)

    def strike(self) -> None:
        """Says that the fault is there: the command is held, or its connection is about to be cut."""
        self._struck.set()

    @property
    def struck(self) -> bool:
        """Whether a command has met the fault."""
        return self._struck.is_set()

    @property
    def released(self) -> bool:
        """Whether what was held may go on."""
        return self._released.is_set()

    def wait(self, timeout_s: float = _BOUND_S) -> None:
        """Blocks until a command has met the fault."""
        assert self._struck.wait(timeout_s), f"no command met {self}"

    def release(self) -> None:
        """Lets go what was held."""
        self._released.set()
