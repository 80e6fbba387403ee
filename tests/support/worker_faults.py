"""Faults of a worker process of `tests/chaos/crew.py`, by name: what hangs when its second job comes by, and for ever.

A hang ends the process with `os._exit`, so it cannot be tested in pytest's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from worker import decode_pace, fetch_stage, finish_stage
from worker.batch_decode import BatchDecoder
from worker.fetch_stage import FetchStage
from worker.finish_stage import FinishStage

#: Variable of the environment that names the fault.
VARIABLE: Final = "WORKER_FAULT"

#: What hangs → (class, method). Each is called once for a job.
HANGS: Final[dict[str, tuple[type, str]]] = {
    "claimed": (FetchStage, "_latents_of"),
    "device": (BatchDecoder, "decode"),
    "encode": (FinishStage, "_encode"),
    "finish": (FinishStage, "_store"),
}
#: "fetch behind a decode": the first job never leaves the device, the second one's latents never come.
BEHIND: Final = "fetch behind a decode"


def install(fault: str | None) -> None:
    """Builds the fault in; without one nothing changes."""
    if fault is None:
        return
    decode_pace._LEAST_S = 2.0  # type: ignore[misc]
    fetch_stage._FETCH_LIMIT_S = 1.0  # type: ignore[misc]
    finish_stage._STORE_LIMIT_S = 1.0  # type: ignore[misc]
    if fault == BEHIND:
        _hang(*HANGS["device"], after=0)
        _hang(*HANGS["claimed"], after=1)
    else:
        _hang(*HANGS[fault], after=1)


def _hang(kind: type, name: str, *, after: int) -> None:
    inner: Callable[..., Any] = getattr(kind, name)
    calls = 0

    def hanging(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            threading.Event().wait()
        return inner(*args, **options)

    setattr(kind, name, hanging)
