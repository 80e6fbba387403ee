"""Blobs as files: whole or not there, never outside the folder, and an error that says what to do."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.errors import BlobMissing, BlobStoreUnavailable, ConfigurationError
from broker_config.external_store import ID_NAME, is_name
from broker_config.file_store import FileStore
from tests.support.external_stores import names_in
from tests.support.processes import ROOT

DATA = bytes(range(256)) * 4096  # 1 MiB
NAME = "job-1.in.0123456789abcdef.00112233445566778899aabbccddeeff"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the store is going to be."""
    return tmp_path / "on" / "a disk"


@pytest.fixture
def store(root: Path) -> Iterator[FileStore]:
    """A store that was just made."""
    made = FileStore(root)
    made.create_id(uuid4().hex)
    yield made
    made.close()


def files_below(root: Path) -> list[Path]:
    """Every file that is not the id."""
    return [path for path in root.rglob("*") if path.is_file() and path.name != ID_NAME]


# Round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_what_was_written_is_read_and_listed_until_deleted(store: FileStore, data: bytes) -> None:
    store.write(NAME, data)
    assert store.read(NAME) == data
    (blob,) = store.listing()
    assert blob.name == NAME
    assert -1 < blob.age_s < 60
    store.delete([NAME, "never-was-there"])
    store.delete([NAME])
    assert store.read(NAME) is None
    assert list(store.listing()) == []


def test_only_this_user_may_read_what_lies_there(store: FileStore, root: Path) -> None:
    store.write(NAME, DATA)
    assert [stat.S_IMODE(path.stat().st_mode) for path in files_below(root)] == [0o600]
    assert {stat.S_IMODE(path.stat().st_mode) for path in [root, *root.iterdir()] if path.is_dir()} == {0o700}


def test_another_process_with_the_same_folder_reads_it(store: FileStore, root: Path) -> None:
    store.write(NAME, DATA)
    other = FileStore(root)
    assert other.read(NAME) == DATA
    other.close()


# Names -------------------------------------------------------------------------------------------------------

BAD_NAMES = [
    "", ".", "..", "../x", "a/b", "/etc/passwd", "a/../../b", ".hidden", "a..b", "a\\b", "a b", "a\0b", "a\n", "ä",
    "x" * 201, "a:b", "~a", "*", f"../{ID_NAME}", "a%2f..",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_leave_the_folder_is_refused(store: FileStore, root: Path, name: str) -> None:
    before = sorted(root.parent.rglob("*"))
    acts: list[Callable[[], object]] = [
        lambda: store.write(name, DATA),
        lambda: store.read(name),
        lambda: store.delete([name]),
    ]
    for act in acts:
        with pytest.raises(BlobMissing, match="not the name of a blob"):
            act()
    assert sorted(root.parent.rglob("*")) == before


@given(name=st.text(max_size=220) | st.from_regex(r"[A-Za-z0-9_./~-]{1,40}"))
def test_a_name_is_refused_or_stays_one_step_below_its_shard(name: str) -> None:
    if is_name(name):
        path = Path("/root/ab") / name
        assert Path(os.path.normpath(path)).parent == Path("/root/ab")
        assert os.path.normpath(path) == str(path)
        assert not name.startswith(".")
        assert len(os.fsencode(name)) <= 200


def test_a_link_that_someone_planted_is_not_followed(store: FileStore, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    store.write(NAME, DATA)
    (path,) = files_below(root)
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(BlobStoreUnavailable):
        store.read(NAME)
    assert list(store.listing()) == []
    store.write(NAME, DATA)
    assert secret.read_bytes() == b"secret"
    assert store.read(NAME) == DATA


# Crashes -----------------------------------------------------------------------------------------------------

#: Writes a blob and dies at the n-th call of one of these functions, before or after it.
_DYING_WRITER = """
import os, signal, sys
from pathlib import Path
from broker_config.file_store import FileStore
root, name, function, number, when = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
store, calls, real = FileStore(root), [0], getattr(os, sys.argv[3])
store.read_id()
def dying(*args, **kwargs):
    calls[0] += 1
    if calls[0] == number and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if function == "write" and when == "within":
        real(args[0], args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    answer = real(*args, **kwargs)
    if calls[0] == number and when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return answer
setattr(os, function, dying)
store.write(name, bytes(range(256)) * 4096)
"""

CRASHES = [
    ("write", 1, "before", False),
    ("write", 1, "within", False),
    ("write", 1, "after", False),
    ("fsync", 1, "before", False),
    ("fsync", 1, "after", False),
    ("rename", 1, "before", False),
    ("rename", 1, "after", True),
    ("fsync", 2, "before", True),
    ("fsync", 2, "after", True),
]


@pytest.mark.parametrize(("function", "number", "when", "visible"), CRASHES)
def test_a_writer_killed_at_any_step_leaves_nothing_or_all_of_it(
    store: FileStore, root: Path, function: str, number: int, when: str, visible: bool
) -> None:
    writer = subprocess.run(
        [sys.executable, "-c", _DYING_WRITER, str(root), NAME, function, str(number), when],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert writer.returncode == -signal.SIGKILL
    assert store.read(NAME) == (DATA if visible else None)
    assert names_in(store) == ({NAME} if visible else set())

    store.write(NAME, DATA)
    assert store.read(NAME) == DATA
    assert store.drop_partial(older_than_s=3600) == 0
    assert store.drop_partial(older_than_s=-60) == (0 if visible else 1)
    assert [path.name for path in files_below(root)] == [NAME]


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_answer(
    store: FileStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def note(function: str) -> None:
        real = getattr(os, function)

        def noting(*args: Any, **kwargs: Any) -> Any:
            what = function
            if function == "fsync":
                what += " folder" if stat.S_ISDIR(os.fstat(args[0]).st_mode) else " file"
            steps.append(what)
            return real(*args, **kwargs)

        monkeypatch.setattr(os, function, noting)

    for function in ("write", "fsync", "rename"):
        note(function)
    store.write(NAME, b"data")
    assert steps == ["write", "fsync file", "rename", "fsync folder"]


# What the system refuses -------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Inside the block the system refuses to write larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_an_error_that_may_pass_and_leaves_nothing(store: FileStore, root: Path) -> None:
    with files_of_at_most(4096), pytest.raises(BlobStoreUnavailable, match="not full") as caught:
        store.write(NAME, DATA)
    assert caught.value.retryable
    assert files_below(root) == []
    store.write(NAME, DATA)
    assert store.read(NAME) == DATA


@contextlib.contextmanager
def without_privileges() -> Iterator[Path]:
    """A folder of another user, and a thread that is nobody: root may write anywhere."""
    folder = Path(tempfile.mkdtemp(prefix="latentq-test-"))
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_this_user_may_not_write_is_an_error_of_configuration() -> None:
    with without_privileges() as folder:
        for root in (folder, folder / "new"):
            store = FileStore(root)
            with pytest.raises(ConfigurationError, match="LATENTQ_BLOB_STORE must name a folder"):
                store.create_id(uuid4().hex)
            store.close()


def test_a_store_this_user_may_only_read_is_an_error_of_configuration() -> None:
    with without_privileges() as folder:
        euid = os.geteuid()
        os.seteuid(os.getuid())
        folder.chmod(0o755)
        FileStore(folder).create_id(uuid4().hex)
        (folder / ID_NAME).chmod(0o644)
        folder.chmod(0o555)
        os.seteuid(euid)
        with pytest.raises(ConfigurationError, match="Permission denied"):
            FileStore(folder).read_id()


def test_a_file_where_the_folder_should_be_is_an_error_of_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="Not a directory"):
        FileStore(tmp_path / "file").read_id()


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"latentq_store": 2, "id": "x"}', b"\xff", b'{"latentq_store": 1}'])
def test_a_damaged_id_is_an_error_of_configuration(store: FileStore, root: Path, damage: bytes) -> None:
    (root / ID_NAME).write_bytes(damage)
    with pytest.raises(ConfigurationError, match="damaged"):
        store.read_id()


# What happens to the folder ----------------------------------------------------------------------------------


def test_nothing_is_written_into_a_folder_that_took_the_place_of_the_store(store: FileStore, root: Path) -> None:
    store.write(NAME, DATA)
    root.rename(root.with_name("moved away"))
    root.mkdir()  # as when the disk is unmounted
    with pytest.raises(BlobStoreUnavailable, match="was replaced"):
        store.write("another", DATA)
    assert list(root.iterdir()) == []
    root.rmdir()
    root.with_name("moved away").rename(root)
    store.write("another", DATA)
    assert store.read(NAME) == DATA


def test_a_folder_that_was_deleted_is_an_error_that_may_pass(store: FileStore, root: Path) -> None:
    shutil.rmtree(root)
    with pytest.raises(BlobStoreUnavailable):
        store.write(NAME, DATA)


def test_of_many_that_make_the_store_at_one_moment_all_see_one_id(root: Path) -> None:
    ids: list[str | None] = []
    barrier = threading.Barrier(8)

    def make() -> None:
        store = FileStore(root)
        barrier.wait()
        store.create_id(uuid4().hex)
        ids.append(store.read_id())
        store.close()

    threads = [threading.Thread(target=make, name="maker") for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert ids[0] is not None
    assert files_below(root) == []
