"""The Range header (RFC 9110, section 14): one range of bytes, or the whole."""

from __future__ import annotations

import re

from broker_config.errors import RangeNotSatisfiable

_ONE = re.compile(r"bytes\s*=\s*(\d{0,18})\s*-\s*(\d{0,18})\s*")


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and end (exclusive) of the one range asked for; None: the whole.

    What is malformed, of another unit, or several ranges at a time is answered with the whole, as the RFC allows.

    Raises:
        RangeNotSatisfiable: the range begins behind the end, or is empty.
    """
    match = _ONE.fullmatch(header.strip()) if header is not None and header.isascii() else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        length = int(match[2])
        if length == 0 or size == 0:
            raise RangeNotSatisfiable(f"the last {length} of {size} bytes are no range")
        return max(0, size - length), size
    first = int(match[1])
    if match[2] and int(match[2]) < first:
        return None
    if first >= size:
        raise RangeNotSatisfiable(f"byte {first} is behind the end of {size} bytes")
    return first, min(size, int(match[2]) + 1) if match[2] else size
