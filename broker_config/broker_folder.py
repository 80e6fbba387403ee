"""The data folder of an embedded broker: who owns it, where its socket is, and how others find the server.

In the folder (0700):

    appendonlydir/    the server's data                    broker.json  `BrokerState`: how others find it
    broker.log, .1    its log, and the previous run's      owner.lock   flock of the process that runs it
    run/broker.sock   (in a short temporary folder where   server.lock  flock of the server process
                      the path is too long for a socket)

DESIGN. Two servers on one append-only file corrupt it, and an owner killed with SIGKILL leaves a server that
still writes. So there are two locks. The owner holds `owner.lock`: while it is taken, a second start is
refused at once. `server.lock` is inherited by the server, and the owner closes its own copy: it is free
exactly when neither a server nor its AOF-rewrite child lives. A new owner has the first lock, waits for the
second, and shuts down a server that nobody told to stop (embedded_broker.py). Lock files are never unlinked: two
processes could then hold the locks of two files with one name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import stat
import tempfile
import time
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

import platformdirs
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from broker_config import errors

_log = logging.getLogger(__name__)

#: `sun_path` with its NUL on macOS; 108 on Linux.
_SOCKET_PATH_LIMIT_BYTES = 104
_POLL_S = 0.005
#: A dying owner spends a while in the kernel before its files close; a child has them, too, until its exec.
_OWNER_GRACE_S = 0.5
#: How long an earlier server gets to end by itself before it is asked to.
_ORPHAN_GRACE_S = 2.0
_ANSWER_BOUND_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BrokerState:
    """A running embedded broker, as other processes read it from broker.json."""

    #: `unix://` and the socket's percent-quoted path.
    url: str
    #: The server's process.
    pid: int
    data_dir: str
    #: "Valkey" or "Redis".
    server: str
    version: str
    #: Unix time at which it was ready.
    started_at: float

    def to_json(self) -> str:
        """The text of the state file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The state in a state file; ValueError or TypeError if the text is anything else."""
        return cls(**json.loads(text))


def default_data_dir() -> Path:
    """The folder of this user's broker."""
    return platformdirs.user_data_path("latentq") / "broker"


def connect(url: str, *, timeout_s: float) -> redis.Redis:
    """A client that says at once how the server is."""
    # Without redis-py's ten retries: the question here is how the server is now.
    retry = Retry(NoBackoff(), 0)
    return redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=retry)


def find_running(data_dir: Path) -> BrokerState | None:
    """The embedded broker that runs on `data_dir`, whoever started it; None if there is none (ready).

    A state file that outlived its server counts as none, also where another process has its pid by now.
    Raises BrokerUnreachable if the server is there but does not answer.
    """
    if (state := read_state(data_dir)) is None:
        return None
    try:
        with connect(state.url, timeout_s=_ANSWER_BOUND_S) as client:
            client.ping()
            pid = client.info("server").get("process_id")
    except redis.TimeoutError as exc:
        what = f"The embedded broker (pid {state.pid}, {state.url}) does not answer"
        raise errors.BrokerUnreachable(f"{what}; see {data_dir / 'broker.log'}.") from exc
    except (redis.RedisError, ValueError):
        return None
    return state if pid == state.pid else None


def read_state(data_dir: Path) -> BrokerState | None:
    """What broker.json says; None where there is none that can be read."""
    try:
        return BrokerState.from_json((data_dir / "broker.json").read_text())
    except (OSError, ValueError, TypeError):
        return None


def own_folder(data_dir: Path) -> int:
    """A descriptor that holds the folder's owner.lock; ConfigurationError, naming the owner, if it is taken."""
    lock = _take_lock(data_dir / "owner.lock", wait_s=_OWNER_GRACE_S)
    if lock is not None:
        return lock
    try:
        state = find_running(data_dir)
        who = f"pid {state.pid}, {state.url}" if state else "it is starting or stopping"
    except errors.BrokerUnreachable as exc:
        who = exc.message
    raise errors.ConfigurationError(
        f"An embedded broker already runs on {data_dir} ({who}); use it, as other latentq commands do by"
        " themselves, or stop it first."
    )


def outlast_earlier_server(lock_path: Path, *, url: str, stop_bound_s: float) -> int:
    """The lock to hand to the next server, taken once the last process of an earlier one has ended.

    An earlier server at `url` that does not end by itself is asked to, and gets `stop_bound_s`.
    """
    lock = _take_lock(lock_path, wait_s=_ORPHAN_GRACE_S)
    if lock is None:
        _log.warning("asking an earlier server at %s to stop", url, extra={"action": "broker_orphan"})
        # By its socket, not by a pid that could be another's by now. It writes its AOF out with NOSAVE too.
        with contextlib.suppress(redis.RedisError), connect(url, timeout_s=_ANSWER_BOUND_S) as client:
            client.shutdown(nosave=True)
        lock = _take_lock(lock_path, wait_s=stop_bound_s)
    if lock is None:
        what = f"A server of an earlier run still writes to {lock_path.parent} and does not stop"
        raise errors.ConfigurationError(f"{what}; end the process that holds {lock_path} (`fuser` names it).")
    return lock


def _take_lock(path: Path, *, wait_s: float) -> int | None:
    """A descriptor that holds the lock, or None if others kept it for `wait_s`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    until_s = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                if time.monotonic() > until_s:
                    os.close(descriptor)
                    return None
                time.sleep(_POLL_S)
    except BaseException:
        os.close(descriptor)
        raise


def socket_path(data_dir: Path) -> Path:
    """Where the server's socket goes: `run/` in the folder, or a short temporary folder where that is too long."""
    folder = data_dir / "run"
    if len(os.fsencode(folder / "broker.sock")) < _SOCKET_PATH_LIMIT_BYTES:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        return folder / "broker.sock"
    # The folder of an owner that was killed is used again: its clients reconnect, and nothing piles up.
    state = read_state(data_dir)
    if state is not None and state.data_dir == str(data_dir):  # a copied folder names the original's socket
        earlier = Path(unquote(urlsplit(state.url).path))
        with contextlib.suppress(OSError):
            found = earlier.parent.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                return earlier
    # Not XDG_RUNTIME_DIR: it is emptied when the user logs out, under a broker that goes on.
    too_long = len(os.fsencode(tempfile.gettempdir())) > 64  # and `/latentq-broker-XXXXXXXX/broker.sock`
    parent = "/tmp" if too_long else None  # noqa: S108 - mkdtemp makes a folder of its own, 0700
    return Path(tempfile.mkdtemp(prefix="latentq-broker-", dir=parent)) / "broker.sock"


def write_durably(path: Path, text: str) -> None:
    """Puts the text in the file's place at once, and on the disk."""
    temporary = path.with_suffix(".tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
