"""Connections to the broker, with every timeout explicit, and driver errors turned into ours.

redis-py 8 times blocking reads out after 5 s and then repeats them, and repeats writes whose reply was lost.
Hence four kinds of client: commands (short timeout; all our writes are scripts that are safe to send
again), blobs (a timeout that fits their size), blocking reads (a timeout above the longest block, no repeats), and a
worker's doorbell (blocks for a second: one whose connection died unheard must not sleep on).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import redis
from redis._parsers import Encoder
from redis.backoff import ExponentialWithJitterBackoff
from redis.connection import PythonRespSerializer
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

from broker_config.broker_folder import find_running
from broker_config.errors import (
    BrokerError,
    BrokerNotRunning,
    BrokerRefusesWrites,
    BrokerUnreachable,
    ConfigurationError,
)
from broker_config.settings import Settings

#: A command takes well under a millisecond; a broker that fsyncs or loads may take seconds.
COMMAND_TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 5.0
#: 256 MiB over a 100 Mbit/s line.
BLOB_TIMEOUT_S: Final = 60.0
#: Longest block a caller may ask for, and the socket timeout above it: a dead network must not hang a reader.
MAX_BLOCK_S: Final = 20.0
_BLOCKING_TIMEOUT_S: Final = 30.0
#: Longest block on a doorbell, and its socket timeout: a broker under load may answer a little late.
BELL_BLOCK_S: Final = 1.0
_BELL_TIMEOUT_S: Final = 3.0
#: 2 MB GET takes 3.6 ms with redis-py's 32 KiB reads and 1.5 ms with these (docs/decisions/0003).
_BLOB_READ_BYTES: Final = 1 << 20
#: Shorter parts of a command are put together before they are sent.
_PACKED_BYTES: Final = 6000


@dataclass(frozen=True, kw_only=True, slots=True)
class Connections:
    """The clients of one process. Thread-safe: each takes connections from a pool."""

    #: Without user name and password: fit for messages and logs.
    url: str
    commands: redis.Redis
    blobs: redis.Redis
    blocking: redis.Redis
    bell: redis.Redis

    def close(self) -> None:
        """Closes every pooled connection."""
        for client in (self.commands, self.blobs, self.blocking, self.bell):
            client.close()
            client.connection_pool.disconnect()


def connect(settings: Settings, *, name: str, retries: int = 3) -> Connections:
    """Clients for the configured broker, or for the embedded one that is running. Nothing is sent yet.

    Raises:
        BrokerNotRunning: no URL is set and no embedded broker runs.
        ConfigurationError: the URL is not one.
    """
    return connect_url(broker_url(settings), name=name, retries=retries)


def broker_url(settings: Settings) -> str:
    """URL of the configured broker, or of the embedded one that is running.

    Raises:
        BrokerNotRunning: no URL is set and no embedded broker runs.
    """
    if settings.redis_url is not None:
        return settings.redis_url.get_secret_value()
    state = find_running(settings.broker_dir)
    if state is None:
        raise BrokerNotRunning()
    return state.url


def connect_url(url: str, *, name: str, retries: int = 3) -> Connections:
    """Clients for `url`. `name` shows in CLIENT LIST; `retries` is how often a failed command is sent again.

    Raises:
        ConfigurationError: not a redis://, rediss:// or unix:// URL.
    """

    def client(*, timeout_s: float, tries: int, read_bytes: int = 65536, **options: Any) -> redis.Redis:
        return redis.Redis.from_url(
            url,
            **options,
            socket_timeout=timeout_s,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_read_size=read_bytes,
            health_check_interval=0,
            client_name=name,
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), tries),
        )

    try:
        _check_login(url)
        return Connections(
            url=redact(url),
            commands=client(timeout_s=COMMAND_TIMEOUT_S, tries=retries),
            blobs=client(
                timeout_s=BLOB_TIMEOUT_S, tries=retries, read_bytes=_BLOB_READ_BYTES, command_packer=_blob_packer()
            ),
            blocking=client(timeout_s=_BLOCKING_TIMEOUT_S, tries=0),
            bell=client(timeout_s=_BELL_TIMEOUT_S, tries=0),
        )
    except ValueError:  # its text may hold parts of a password
        raise ConfigurationError(
            f"LATENTQ_REDIS_URL {redact(url)!r} is not a broker URL: use redis://host:6379/0, rediss://… or "
            "unix:///path, and in a user name or password %2F for /, %23 for #, %3F for ?, %40 for @, %5B for ["
        ) from None


def _blob_packer() -> PythonRespSerializer:
    """Sends large values as they are; hiredis' packer copies them twice, and nothing else runs in Python meanwhile."""
    return PythonRespSerializer(_PACKED_BYTES, Encoder("utf-8", "strict", decode_responses=False).encode)


#: What a query of a broker's URL begins with (redis-py `URL_QUERY_ARGUMENT_PARSERS`, and arguments of its connections).
_OPTION: Final = re.compile(
    r"(db|username|password|client_name|protocol|max_connections|timeout|retry_\w+|socket_\w+|ssl_\w+|health_\w+)="
)
_HOST: Final = re.compile(r"(([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?)?")


def _check_login(url: str) -> None:
    """Raises ValueError where a password ends the host by a sign of its own: another server would be asked."""
    parts = urlsplit(url)
    rest = url.partition("://")[2]
    if parts.scheme not in ("redis", "rediss") or "@" not in rest or "@" in parts.netloc:
        return
    if "@" in parts.path + parts.fragment + parts.query.partition("=")[0] or not parts.hostname:
        raise ValueError(url)


def redact(url: str) -> str:
    """`url` without user name, password and query, also where these are not written as a URL has them."""
    scheme, mark, rest = url.partition("://")
    before, _, query = (rest if mark else url).partition("?")
    # What follows may be part of a password; only as the driver's own options it is none.
    is_host = _HOST.fullmatch(before.partition("/")[0]) is not None
    well_formed = "@" not in query or (_OPTION.match(query) is not None and ("@" in before or is_host))
    address = (before if well_formed else rest if mark else url).rpartition("@")[2]
    for sign in "?#":
        address = address.partition(sign)[0]
    return f"{scheme}{mark}{address}" if mark else address


@contextlib.contextmanager
def broker_errors(url: str) -> Iterator[None]:
    """Turns the driver's errors into ours, with the address and what to do."""
    try:
        yield
    except AuthenticationError as error:
        raise BrokerUnreachable(f"the broker at {url} refuses the login ({error}): check user and password") from error
    except (ConnectionError, TimeoutError, OSError) as error:
        raise BrokerUnreachable(
            f"the broker at {url} does not answer ({type(error).__name__}): start it with `latentq up`, or check "
            "LATENTQ_REDIS_URL, the network, and the disk and log of a broker that does not stay up"
        ) from error
    except (OutOfMemoryError, ReadOnlyError) as error:
        raise BrokerRefusesWrites(
            f"the broker at {url} refuses writes ({error}): raise its maxmemory or let workers catch up"
        ) from error
    except ResponseError as error:
        if str(error).startswith(("MISCONF", "OOM", "READONLY", "NOREPLICAS")) or "OOM command" in str(error):
            raise BrokerRefusesWrites(
                f"the broker at {url} refuses writes ({error}): check its disk and memory with `latentq doctor`"
            ) from error
        raise BrokerError(f"the broker at {url} answered with an error: {error}") from error
    except RedisError as error:
        raise BrokerError(f"talking to the broker at {url} failed: {error}") from error
