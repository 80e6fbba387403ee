"""Keeps a decode on the host from taking more memory than it uses, by telling glibc's malloc what its blocks are.

Left alone, glibc keeps freed blocks of up to 32 MiB in the heap. After a decode's early stages the heap is full of
holes of their activations, which later strips do not fill: 90 to 130 MiB of SD's VAE at 512², a third of what the
decode itself takes then. Mapping every block one by one leaves no holes, but each strip then faults its pages in again:
half the time of a decode in bfloat16. So activations are mapped, strips stay in the heap and are reused there, and
between two steps what is free goes back to the system, and within one whenever the process has grown by much.

Where the address space is limited (`ulimit -v`), a hole counts as memory does, and cannot go back. There every strip is
mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

#: Of malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
#: The largest value glibc takes for it, to which it raises it by itself once so large a block was freed; and the
#: memory it keeps at the end of the heap then.
LARGEST_IN_HEAP_BYTES: Final = 32 << 20
_USUALLY_KEPT_BYTES: Final = 2 * LARGEST_IN_HEAP_BYTES
#: Free memory at the end of the heap that stays there until `give_back`: all strips of a step.
_KEPT_BYTES: Final = 512 << 20
#: A process may grow by this at least before it looks for free memory in its heap.
_GROWN_BYTES: Final = 2 << 20
#: Blocks from here on are mapped where the address space is limited.
_MAPPED_BYTES: Final = 1 << 20
#: What a decode takes on a CPU besides its activations: oneDNN's and the BLAS's own buffers, code they generate.
_ASIDE_BYTES: Final = 16 << 20


#: What the decodes that run now may let the process grow by.
_spare: Final[list[int]] = []


@functools.cache
def _libc() -> Any | None:
    """The C library; None where it is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    except (AttributeError, OSError, TypeError):
        return None
    return libc


@contextlib.contextmanager
def strips_in_heap(strip_bytes: int, *, spare_bytes: int = 0) -> Iterator[None]:
    """For a block of code, in the whole process: what is well above a strip is mapped, what is smaller is reused.

    All is mapped where the address space is limited, and stays so. Afterwards free memory goes back, and malloc keeps
    what it comes to keep by itself: plain decodes would fault in every activation anew.

    Args:
        strip_bytes: of the largest strip.
        spare_bytes: by which the process may grow, though strips alone would not let it, before free memory goes back.
    """
    libc = _libc()
    if libc is None:
        yield
        return
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    mapped = _MAPPED_BYTES if limited else min(LARGEST_IN_HEAP_BYTES, max(_MAPPED_BYTES, 2 * strip_bytes))
    give_back()  # what a plain decode left
    _spare.append(spare_bytes)
    libc.mallopt(_M_MMAP_THRESHOLD, mapped)
    libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        _spare.remove(spare_bytes)
        if not limited:
            libc.mallopt(_M_MMAP_THRESHOLD, _asked_for("MALLOC_MMAP_THRESHOLD_") or LARGEST_IN_HEAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _asked_for("MALLOC_TRIM_THRESHOLD_") or _USUALLY_KEPT_BYTES)
        give_back()


def _asked_for(name: str) -> int | None:
    """What the environment tells glibc's malloc; None where it is silent."""
    told = os.environ.get(name, "")
    return int(told) if told.isascii() and told.isdigit() else None


def give_back() -> None:
    """Returns free pages of the heap to the system; a millisecond, and nothing where the C library is not glibc."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


class Growth:
    """Of the process, since free memory last went back.

    glibc before 2.38 does not reuse an aligned block for one of the same size (its bug 14581), so a heap grows by about
    a strip with each.
    """

    def __init__(self, most_bytes: int = 0) -> None:
        """Args:
        most_bytes: by which it may grow, where the decodes that run now do not let it grow by more.
        """
        self._most = max(_GROWN_BYTES, most_bytes, min(_spare, default=0))
        self._before = _resident()

    def give_back(self) -> None:
        """Returns free pages of the heap to the system if the process has grown by much. Cheap: call it for each strip.

        What is not free makes it grow as well, and does no harm: one more look at the heap for each so many bytes.
        """
        if _resident() - self._before > self._most:
            give_back()
            self._before = _resident()


def _resident() -> int:
    """Bytes of this process in memory; 0 where the kernel does not tell."""
    try:
        pages = Path("/proc/self/statm").read_bytes().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def probe(needed_bytes: int) -> None:
    """Fails where the address space is too small, while failing is harmless: oneDNN crashes when it gets no memory.

    The memory is not touched, so it is not taken either.
    """
    torch.empty(needed_bytes + _ASIDE_BYTES, dtype=torch.uint8)
