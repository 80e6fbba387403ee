"""What a container or a service leaves to its processes: the memory limit of the control group, and what is free in it.

`/proc/meminfo` tells of the whole machine, and a process that believes it is killed without a word. Both versions of
control groups are read (kernel documentation, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst). A worker asks before
each decode, so the files are looked for once in a process; the limits themselves may change at any time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["free_bytes", "limit_bytes"]

_ROOT: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")
#: "No limit" of version 1 is the largest multiple of a page below 2⁶³.
_NO_LIMIT: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class _Files:
    controller: str
    limit: str
    used: str
    #: Line of `memory.stat` with pages of files that go when memory is short.
    reclaimable: str


_V2: Final = _Files(controller="", limit="memory.max", used="memory.current", reclaimable="inactive_file")
_V1: Final = _Files(
    controller="memory",
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    reclaimable="total_inactive_file",
)


def limit_bytes(*, root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """The most memory this process's control group may take; None: no limit."""
    limits = [limit for limit, _ in _limits(root, own)]
    return min(limits, default=None)


def free_bytes(*, root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """What the control group may still take, pages of files it can drop included; None: no limit."""
    return min((max(0, limit - used) for limit, used in _limits(root, own)), default=None)


def _limits(root: Path, own: Path) -> list[tuple[int, int]]:
    """(limit, used) of the group and of each above it that has a limit."""
    found = []
    for limit_file, used_file, stat_file, reclaimable in _found(root, own):
        limit = _number(limit_file)
        used = None if limit is None or limit >= _NO_LIMIT else _number(used_file)
        if limit is not None and used is not None:
            found.append((limit, max(0, used - _stat(stat_file, reclaimable))))
    return found


@functools.cache
def _found(root: Path, own: Path) -> tuple[tuple[str, str, str, str], ...]:
    """Files of limit, use and statistics, and the line of the latter that is wanted, of the groups that have them."""
    return tuple(
        (str(folder / files.limit), str(folder / files.used), str(folder / "memory.stat"), files.reclaimable)
        for files in (_V2, _V1)
        for folder in _folders(root, own, files)
        if (folder / files.limit).is_file()
    )


def _folders(root: Path, own: Path, files: _Files) -> list[Path]:
    """The folder of this process's group and those above it. In a container the path is that of the host, and only the
    root is there."""
    base = root / files.controller
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return [base]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if files.controller in controllers.split(","):
            inside = base / path.lstrip("/")
            return [folder for folder in (inside, *inside.parents) if folder == base or base in folder.parents]
    return [base]


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):  # not there, or "max"
        return None


def _stat(path: str, name: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.split()[0] == name), 0)
    except OSError:
        return 0
