"""Waiting for conditions, with a bound, instead of for time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, timeout_s: float = 30.0, every_s: float = 0.01, what: str = "") -> T:
    """The first true value of `condition()`, asked `every_s`; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for {what or condition}")
        time.sleep(every_s)


async def wait_until_async(condition: Callable[[], T], *, timeout_s: float = 30.0, what: str = "") -> T:
    """As `wait_until`, while the loop goes on."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for {what or condition}")
        await asyncio.sleep(0.01)
