"""Gives memory that was freed on the host back to the system.

glibc keeps freed blocks below 32 MiB (its largest dynamic mmap threshold) in the heap for later. After a decode's early
stages the heap is full of holes of their size, which its later strips do not fill: 90 to 130 MiB of SD's VAE at 512²,
a third of what the decode itself takes then. So blocks of a strip's size are mapped one by one, and between two steps
the holes there are all the same are given back. Both together made the peak what arithmetic says; neither was seen in
the time of a decode.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

#: M_MMAP_THRESHOLD of malloc.h.
_M_MMAP_THRESHOLD: Final = -3
#: Blocks from this size on are mapped. Below are what norms need for a piece of a strip, and weights.
_MAPPED_FROM_BYTES: Final = 256 << 10


@functools.cache
def _libc() -> Any | None:
    """The C library, told to map larger blocks; None where it is not glibc. Holds for the process from then on."""
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    except (AttributeError, OSError, TypeError):
        return None
    libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
    return libc


def give_back() -> None:
    """Returns free pages of the heap to the system; a millisecond, and nothing where the C library is not glibc."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
