"""Quantities as a person reads them in a terminal."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ((48 * 3600, 86_400, "d"), (2 * 3600, 3600, "h"), (120, 60, "min"))


def duration(seconds: float) -> str:
    """`0.4 s`, `95 s`, `35 min`, `12 h`, `9 d`: never off by more than one part in two."""
    for from_s, unit_s, name in _UNITS:
        if seconds >= from_s:
            return f"{int(seconds // unit_s)} {name}"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{round(seconds)} s"


def byte_size(count: float) -> str:
    """`512 B`, `1.5 MiB`, `64.0 GiB`."""
    if count < 1024:
        return f"{int(count)} B"
    power = min(4, (int(count).bit_length() - 1) // 10)
    return f"{count / 1024**power:.1f} {' KMGT'[power]}iB"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 job`, `3 jobs`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
