"""Processes of one machine: starts them, restarts the ones that die, ends them together.

Used by `latentq up` and `latentq demo`. Children are separate programs (never forks: CUDA cannot be used in a
forked child) in the supervisor's session; they are told to stop with SIGTERM, in the reverse order of their start.

DESIGN. A child that ends with status 2 cannot work as configured, so everything ends with its message. Any other end
is a crash or a hang: it is started again after a pause that doubles with each quick end; so is the embedded broker
(kept_broker.py). When the supervisor is killed, the broker follows by itself (embedded_broker.py) and on Linux the
children too (`PR_SET_PDEATHSIG`).
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from broker_config.exit_status import EXIT_UNUSABLE

logger = logging.getLogger(__name__)

PAUSE_FIRST_S: Final = 0.5
_PAUSE_LONGEST_S: Final = 30.0
#: A child that lived this long ended for a new reason.
_SETTLED_S: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(slots=True)
class Child:
    """One kept process."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = 0.0
    pause_s: float = PAUSE_FIRST_S
    restarts: int = 0
    statuses: list[int] = field(default_factory=list)


def dying_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """What a child runs first so that it gets a signal when we die: when the thread ends, in fact, that starts it."""
    parent = os.getpid()

    def ask() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, number)
            if os.getppid() != parent:  # it died before we could ask
                os._exit(EXIT_UNUSABLE)

    return ask


def sharing_cores(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that computes beside others on this machine's cores.

    OpenMP's threads spin while they wait for one another. Where two processes have as many threads as there are cores,
    each spins in the time the other needs: with a worker and other work beside it, denoising took 5 to 15 times as
    long on two cores. Threads that sleep instead compute the same. What the user has set stays.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **environment}


def next_pause_s(pause_s: float, *, lived_s: float) -> float:
    """How long what has ended is left alone, after `pause_s` the last time: twice as long with each quick end."""
    return PAUSE_FIRST_S if lived_s > _SETTLED_S else min(pause_s * 2, _PAUSE_LONGEST_S)


class Supervisor:
    """Keeps processes running until `stop`. Not thread-safe: call it from one thread."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._stopping = False

    def start(self, name: str, command: Sequence[str], *, environment: Mapping[str, str]) -> Child:
        """Starts a process and keeps it running. `environment` is added to our own."""
        child = Child(name=name, command=command, environment={**os.environ, **environment})
        self._children.append(child)
        self._spawn(child)
        return child

    def check(self) -> str | None:
        """Restarts what ended. Returns the name of a child that cannot work as configured, else None."""
        now = time.monotonic()
        for child in self._children:
            if child.process is None:
                if not self._stopping and now >= child.restart_at:
                    child.restarts += 1
                    self._spawn(child)
                continue
            status = child.process.poll()
            if status is None:
                continue
            child.process = None
            child.statuses.append(status)
            if self._stopping:
                continue
            if status == EXIT_UNUSABLE:
                return child.name
            child.pause_s = next_pause_s(child.pause_s, lived_s=now - child.started)
            child.restart_at = now + child.pause_s
            logger.warning(
                "%s ended with status %d, starting it again in %.1f s",
                child.name,
                status,
                child.pause_s,
                extra={"action": "child_ended", "child": child.name, "status": status},
            )
        return None

    def stop(self, *, timeout_s: float = 95.0) -> None:
        """Ends every child, the last one started first; kills what has not ended in time."""
        self._stopping = True
        deadline = time.monotonic() + timeout_s
        for child in reversed(self._children):
            if child.process is not None and child.process.poll() is None:
                child.process.terminate()
        for child in reversed(self._children):
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.error("%s did not end in time, killing it", child.name, extra={"action": "child_killed"})
                child.process.kill()
                child.process.wait()
            child.process = None

    def _spawn(self, child: Child) -> None:
        child.started = time.monotonic()
        child.process = subprocess.Popen(
            child.command,
            env=dict(child.environment),
            stdin=subprocess.DEVNULL,
            preexec_fn=dying_with_parent(),
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which ends the children in order
        )
        logger.info(
            "%s started", child.name, extra={"action": "child_started", "child": child.name, "pid": child.process.pid}
        )
