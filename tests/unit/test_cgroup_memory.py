"""Limits of control groups, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_config.cgroup_memory import free_bytes, limit_bytes

GIB = 1 << 30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "own"


def test_version_2_in_a_container(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/\n")
    write(
        tmp_path,
        memory__max=f"{4 * GIB}\n",
        memory__current=f"{3 * GIB}\n",
        memory__stat=f"anon 5\ninactive_file {GIB}\n",
    )
    assert limit_bytes(root=tmp_path, own=own) == 4 * GIB
    assert free_bytes(root=tmp_path, own=own) == 2 * GIB


def test_the_tightest_of_the_groups_above_counts(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/system.slice/latentq.service\n")
    write(tmp_path / "system.slice", memory__max=f"{2 * GIB}\n", memory__current=f"{GIB}\n")
    write(tmp_path / "system.slice" / "latentq.service", memory__max="max\n", memory__current=f"{GIB}\n")
    assert free_bytes(root=tmp_path, own=own) == GIB


def test_version_1(tmp_path: Path, own: Path) -> None:
    own.write_text("4:memory:/docker/0123abc\n0::/\n")
    write(
        tmp_path / "memory",
        memory__limit_in_bytes=f"{2 * GIB}\n",
        memory__usage_in_bytes=f"{GIB}\n",
        memory__stat="cache 7\ntotal_inactive_file 1024\n",
    )
    assert free_bytes(root=tmp_path, own=own) == GIB + 1024


def test_no_limit_is_no_limit(tmp_path: Path, own: Path) -> None:
    own.write_text("4:memory:/\n0::/\n")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712\n", memory__usage_in_bytes="1024\n")
    write(tmp_path, memory__max="max\n", memory__current="1024\n")
    assert limit_bytes(root=tmp_path, own=own) is None
    assert free_bytes(root=tmp_path, own=own) is None


def test_no_control_groups(tmp_path: Path, own: Path) -> None:
    assert limit_bytes(root=tmp_path / "none", own=own) is None
