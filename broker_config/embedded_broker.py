"""The embedded broker: a real Valkey or Redis server as a child process, for a machine that has no broker.

Its data folder and the locks in it are broker_folder.py's; which server is run, supported_servers.py's.

DESIGN. The server ends with its owner. On Linux the kernel sends it SIGTERM (PR_SET_PDEATHSIG), but when the *thread*
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
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import quote

import redis

from broker_config import cgroup_memory, errors
from broker_config.aof_syncing import AofSyncing
from broker_config.broker_folder import (
    BrokerState,
    connect,
    outlast_earlier_server,
    own_folder,
    read_state,
    socket_path,
    write_durably,
)
from broker_config.supported_servers import find_server_binary, server_version

_log = logging.getLogger(__name__)

_POLL_S = 0.005
#: Until the server listens: 0.04 to 0.13 s were measured; the rest is for busy machines and slow disks.
_START_BOUND_S = 30.0
#: Once it listens it reads its AOF, for as long as that takes; but it must have read on within this time. A value or a
#: command is read as one, so it may be silent for seconds on a slow disk.
_LOADING_BOUND_S = 120.0
#: From SIGTERM to the exit: 0.1 s were measured; an fsync of much data to a slow disk is what takes long.
_STOP_BOUND_S = 60.0
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


class EmbeddedBroker:
    """One broker on `data_dir`; as a context manager it runs inside the block. Methods are thread-safe.

    `binary` is LATENTQ_REDIS_SERVER where that is set, `max_memory_bytes` is `default_max_memory_bytes()`
    unless given, `appendfsync` is always, everysec (by a thread of this process: `aof_syncing`) or no. With
    `dies_with_owner=False` the server goes on, and goes on owning the folder, when this process ends without `stop`.
    `should_stop` is asked while the server reads its data, which may take minutes; True ends it, and `start` raises.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        max_memory_bytes: int | None = None,
        binary: Path | None = None,
        appendfsync: str = "everysec",
        dies_with_owner: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        if appendfsync not in ("always", "everysec", "no"):
            raise errors.ConfigurationError("appendfsync is always, everysec or no.", field="appendfsync")
        self._data_dir = data_dir.absolute()
        self._max_memory_bytes = default_max_memory_bytes() if max_memory_bytes is None else max_memory_bytes
        self._binary = binary
        self._appendfsync = appendfsync
        self._syncing: AofSyncing | None = None
        self._dies_with_owner = dies_with_owner
        self._should_stop = should_stop
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

        Where a dead one does not come back the folder and the URL stay this broker's, until `stop`.

        Raises ConfigurationError if another process runs a broker here (naming it) or the folder is not
        usable, BrokerUnreachable (with the end of its log) if the server ends or hangs, and what
        `find_server_binary` raises.
        """
        with self._mutex:
            if self._state is not None and self._server is not None and self._server.poll() is None:
                return self._state
            again = self._state is not None
            try:
                self._end_server()  # reaps a dead one and its watcher
                self._state = self._launch(find_server_binary(self._binary))
                if self._appendfsync == "everysec":
                    self._syncing = AofSyncing(self._data_dir / "appendonlydir")
                    self._syncing.start()
            except BaseException as exc:  # also KeyboardInterrupt: never leave a server behind
                if again:
                    self._end_server()
                else:
                    self.stop()
                if isinstance(exc, OSError):
                    what = f"The embedded broker cannot use {self._data_dir}: {exc}."
                    raise errors.ConfigurationError(what) from exc
                raise
            return self._state

    def ended(self) -> int | None:
        """Exit status of a server that ended by itself; None: it runs, or none was started."""
        with self._mutex:
            return None if self._server is None else self._server.poll()

    def stop(self) -> None:
        """Stop the server in good order and let go of the folder; nothing happens if it does not run."""
        with self._mutex:
            # First the state, so that nobody finds a broker that is going; and only ours.
            if self._state is not None and read_state(self._data_dir) == self._state:
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
            self._owner_lock = own_folder(self._data_dir)
        if self._socket is None:
            self._socket = socket_path(self._data_dir)
        url = f"unix://{quote(str(self._socket))}"
        server_lock = outlast_earlier_server(self._data_dir / "server.lock", url=url, stop_bound_s=_STOP_BOUND_S)
        try:
            self._socket.unlink(missing_ok=True)
            running = self._spawn(binary, self._socket, server_lock=server_lock)
        finally:
            os.close(server_lock)  # from here on only the server holds it
        log_path = self._data_dir / "broker.log"
        server, version = _await_ready(running, url, log_path=log_path, should_stop=self._should_stop)
        state = BrokerState(
            url=url,
            pid=running.pid,
            data_dir=str(self._data_dir),
            server=server,
            version=version,
            started_at=time.time(),
        )
        write_durably(self._data_dir / "broker.json", state.to_json())
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


class _Patience:
    """How long a start is waited for: until the server listens, then while it reads on."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._loaded_bytes: int | None = None
        self.bound_s = _START_BOUND_S

    def loads(self) -> None:
        """It listens, and reads its AOF."""
        self.bound_s = _LOADING_BOUND_S

    def is_over(self, now_s: float, *, loaded_bytes: int | None) -> bool:
        """Whether nothing happened for too long. `loaded_bytes`: what it has read; None: not known now."""
        if now_s - self._since_s > self.bound_s:
            return True
        if loaded_bytes not in (None, self._loaded_bytes):
            self._since_s, self._loaded_bytes = now_s, loaded_bytes
        return False


def _loaded_bytes(client: redis.Redis) -> int | None:
    """What a server that reads its AOF has read of it; None: it does not say."""
    try:
        found = client.info("persistence").get("loading_loaded_bytes")
    except redis.RedisError:  # busy with a large value, or ending
        return None
    return None if found is None else int(found)


def _await_ready(
    server: subprocess.Popen[bytes], url: str, *, log_path: Path, should_stop: Callable[[], bool]
) -> tuple[str, str]:
    patience = _Patience(time.monotonic())
    with connect(url, timeout_s=1.0) as client:
        while True:
            loaded_bytes = None
            try:
                client.ping()
                info = client.info("server")
                break
            except (redis.BusyLoadingError, redis.TimeoutError):  # it listens, and reads its AOF
                patience.loads()
                loaded_bytes = _loaded_bytes(client)
            except redis.RedisError:  # it does not listen yet
                pass
            if should_stop():
                raise errors.BrokerUnreachable("The embedded broker was stopped before it was ready.")
            status = server.poll()
            if status is not None or patience.is_over(time.monotonic(), loaded_bytes=loaded_bytes):
                what = f"was not ready in {patience.bound_s:g} s" if status is None else f"ended with status {status}"
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
    return server_version(info)
