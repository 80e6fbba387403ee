"""What happens in a run, as its parts tell it: the same records in one process and between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from broker_config.errors import LatentqError, walk


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoised:
    """A call of the pipeline returned latents."""

    device: str
    #: Tasks that it was for.
    tasks: tuple[str, ...]
    #: Seconds of the monotonic clock, which all processes of a machine share.
    began_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """Latents of a task are safe: in the queue, or in the spool."""

    task: str
    #: Whether they wait in the spool.
    spooled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """A task will not be made in this run."""

    task: str
    #: denoise, submit, decode or store.
    stage: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A task's result is where it belongs."""

    task: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Delayed:
    """Something does not go on for now, and is tried again."""

    #: submit, decode or store.
    stage: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Restarted:
    """A generator process died and another one takes its place."""

    device: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenUp:
    """A device gets nothing done, and no prompt of this run any more."""

    device: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """A generator has nothing left to do."""

    device: str


Event = Denoised | Submitted | Failed | Saved | Delayed | Restarted | GivenUp | Ended

#: Those that come out of a generator process.
_FROM_GENERATOR: Final[Mapping[str, Callable[..., Event]]] = {
    kind.__name__: kind for kind in (Denoised, Submitted, Failed, Delayed)
}


def to_wire(event: Event) -> dict[str, Any]:
    """As JSON takes it."""
    return {"event": type(event).__name__, **asdict(event)}


def from_wire(wire: Mapping[str, Any]) -> Event:
    """What `to_wire` made."""
    values: dict[str, Any] = {
        name: tuple(value) if name == "tasks" else value for name, value in wire.items() if name != "event"
    }
    return _FROM_GENERATOR[wire["event"]](**values)


def failure(task: str, stage: str, error: Exception) -> Failed:
    """An exception as an event."""
    code = error.code if isinstance(error, LatentqError) else "error"
    message = error.message if isinstance(error, LatentqError) else f"{type(error).__name__}: {error}"
    return Failed(task=task, stage=stage, code=code, message=message)


def error_from_wire(wire: Mapping[str, Any]) -> LatentqError:
    """The error that another process has told of, with `LatentqError.to_wire`."""
    for kind in walk():
        if kind.code == wire["code"]:
            try:
                return kind(wire["message"], field=wire.get("field"))
            except TypeError:  # it carries more than that
                break
    return LatentqError(wire["message"], field=wire.get("field"))
