"""What the broker answers, as our own types: pipelines, times, texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from redis.exceptions import ResponseError

from broker_config.connection import Connections, broker_errors


@contextlib.contextmanager
def pipelined(connections: Connections, *, transaction: bool = False) -> Iterator[Any]:
    """A pipeline whose errors are ours."""
    with broker_errors(connections.url), connections.commands.pipeline(transaction=transaction) as pipe:
        yield pipe


def readable(pipe: Any) -> list[Any]:
    """The answers of a pipeline that reads records; None where a key is of another kind.

    Someone wrote over that record with tools of their own: it is as gone as a deleted one, and no reason to show none.
    """
    answers = pipe.execute(raise_on_error=False)
    for number, answer in enumerate(answers):
        if isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE"):
            answers[number] = None
        elif isinstance(answer, Exception):
            raise answer
    return list(answers)


def time_ms(time: tuple[int, int]) -> int:
    """The broker's answer to TIME, in milliseconds since the epoch."""
    return int(time[0]) * 1000 + int(time[1]) // 1000


def text(value: bytes | str, *, errors: str = "strict") -> str:
    """What the driver hands out as bytes. `errors`: what becomes of bytes that are no UTF-8, as `bytes.decode` says."""
    return value.decode(errors=errors) if isinstance(value, bytes) else value
