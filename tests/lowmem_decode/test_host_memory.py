"""What malloc is told for a decode holds for that decode alone: seen in what it maps, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

_MAPPED = """
import ctypes, platform, resource, sys
from worker.lowmem_decode.host_memory import strips_in_heap

if platform.libc_ver()[0] != "glibc":
    sys.exit(3)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def is_mapped(mib):
    block = libc.malloc((mib << 20) + 12345)
    heap = next(line for line in open("/proc/self/maps") if "[heap]" in line).split()[0].split("-")
    inside = int(heap[0], 16) <= block < int(heap[1], 16)
    libc.free(block)
    return not inside

if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
with strips_in_heap(4 << 20):
    print([is_mapped(mib) for mib in (2, 6, 12)], end=" ")
print([is_mapped(mib) for mib in (2, 12, 48)])
"""


def mapped(how: str, **environment: str) -> str:
    """Which blocks are mapped while strips of 4 MiB are expected, then afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", _MAPPED, how],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_blocks_above_two_strips_are_mapped_and_afterwards_only_large_ones() -> None:
    assert mapped("free") == "[False, False, True] [False, False, True]"


def test_every_strip_is_mapped_where_the_address_space_is_limited() -> None:
    assert mapped("limited") == "[True, True, True] [True, True, True]"


def test_what_the_environment_tells_malloc_holds_again_afterwards() -> None:
    assert mapped("free", MALLOC_MMAP_THRESHOLD_=str(4 << 20)) == "[False, False, True] [False, True, True]"
