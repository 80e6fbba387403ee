"""A proxy between clients and the broker that loses exactly what a test wants lost.

DESIGN. An asyncio loop in a thread of its own; two tasks for each connection, one for each direction. Requests and
replies are parsed (RESP2 and RESP3, inline commands too) and forwarded frame by frame, so a fault hits a command
and never the middle of one. A connection that is cut after a command has got every reply that came before it, and
the broker has got nothing that comes after it. Commands are numbered in the order in which they reach the proxy,
over all connections, from 1. Commands that answer with push frames only (SUBSCRIBE …) can be cut, but their
replies are not awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

from redis.connection import parse_url

from tests.support.proxy_rules import Fault, Rule

T = TypeVar("T")

#: What asyncio buffers of a connection before it stops reading; a frame may be larger.
_BUFFER_BYTES: Final = 4 << 20
_BOUND_S: Final = 30.0
#: A client that is stopped or dead reads no more.
_FLUSH_S: Final = 2.0
_ANSWER_IN_PUSH_FRAMES: Final = frozenset(
    {"SUBSCRIBE", "UNSUBSCRIBE", "PSUBSCRIBE", "PUNSUBSCRIBE", "SSUBSCRIBE", "SUNSUBSCRIBE"}
)


_CUTS: Final = (Fault.SWALLOW_REPLY, Fault.CUT_BEFORE)


@dataclass(eq=False)
class _Link:
    """One client's connection and ours to the broker."""

    client: asyncio.StreamWriter
    broker: asyncio.StreamWriter
    #: One entry for each command whose reply is still to come: the rule that waits for it, or None.
    pending: deque[Rule | None] = field(default_factory=deque)
    #: Set whenever `pending` shrinks.
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    def abort(self) -> None:
        for writer in (self.client, self.broker):
            writer.transport.abort()


class FaultyProxy:
    """A broker at `url` that is the upstream one, but for the faults asked for. Thread-safe.

    Rules stay until they have struck or `reset`; of several that fit a command, the first made wins.
    """

    def __init__(self, upstream_url: str) -> None:
        """Args:
        upstream_url: redis:// or unix://.
        """
        self._upstream = parse_url(upstream_url)
        self._port = 0
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._commands: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._refusing = False
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_BOUND_S)
        self._loop.close()

    # What a test sees -----------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the proxy listens: `redis://127.0.0.1:port`, with the upstream's login and database."""
        login = ""
        if self._upstream.get("username") or self._upstream.get("password"):
            user, password = (self._upstream.get(name) or "" for name in ("username", "password"))
            login = f"{quote(user, safe='')}:{quote(password, safe='')}@"
        database = f"/{self._upstream['db']}" if self._upstream.get("db") else ""
        return f"redis://{login}127.0.0.1:{self._port}{database}"

    @property
    def commands(self) -> list[str]:
        """Names of the commands that reached the proxy since it started or was reset, in order."""
        with self._lock:
            return list(self._commands)

    @property
    def connections(self) -> int:
        """Open connections."""
        return self._do(self._count())

    # Faults ---------------------------------------------------------------------------------------------

    def swallow_reply(self, *, nth: int = 1, command: str | None = None, argument: bytes | None = None) -> Rule:
        """The broker executes the n-th command; the client loses its connection instead of getting the reply."""
        return self._add(Rule(Fault.SWALLOW_REPLY, nth=nth, command=command, argument=argument))

    def cut_before(self, *, nth: int = 1, command: str | None = None, argument: bytes | None = None) -> Rule:
        """The client loses its connection before the n-th command reaches the broker."""
        return self._add(Rule(Fault.CUT_BEFORE, nth=nth, command=command, argument=argument))

    def hold_reply(self, *, nth: int = 1, command: str | None = None, argument: bytes | None = None) -> Rule:
        """The broker executes the n-th command; the reply, and all that follows, waits for `release`."""
        return self._add(Rule(Fault.HOLD_REPLY, nth=nth, command=command, argument=argument))

    def hold(self, *, nth: int = 1, command: str | None = None, argument: bytes | None = None) -> Rule:
        """The n-th command, and all that follows it on its connection, waits for `release`."""
        return self._add(Rule(Fault.HOLD, nth=nth, command=command, argument=argument))

    def delay(self, delay_s: float, *, nth: int = 1, times: int | None = None, command: str | None = None) -> Rule:
        """From the n-th on, `times` commands (None: all) reach the broker late."""
        return self._add(Rule(Fault.DELAY, nth=nth, times=times, command=command, delay_s=delay_s))

    def cut_all(self) -> None:
        """Cuts every connection now, wherever it is. New ones are accepted."""
        self._do(self._cut_all())

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Inside the block every connection is cut and new ones are refused, as when the broker is down."""
        self._do(self._refuse(True))
        try:
            yield
        finally:
            self._do(self._refuse(False))

    def refuse_for(self, duration_s: float) -> None:
        """Cuts every connection and refuses new ones for `duration_s`; returns at once."""
        self._do(self._refuse(True))
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._admit_later(duration_s)))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block nothing passes, in either direction, and no connection is closed: a dead network."""
        self._loop.call_soon_threadsafe(self._flowing.clear)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._flowing.set)

    def reset(self) -> None:
        """Forgets rules and counted commands; what is held goes on. Connections stay."""
        with self._lock:
            for rule in self._rules:
                rule.release()
            self._rules.clear()
            self._commands.clear()

    # Inside ---------------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_BOUND_S)

    def _add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def _rule_for(self, name: str, arguments: list[bytes]) -> Rule | None:
        with self._lock:
            self._commands.append(name)
            taking = [rule for rule in self._rules if rule.takes(name, arguments)]  # every rule counts
            return taking[0] if taking else None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _count(self) -> int:
        return len(self._links)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, limit=_BUFFER_BYTES)
            self._port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self, on: bool, /) -> None:
        # The door stays open and who comes is turned away: asyncio leaks the transport of a connection that it is
        # accepting in the moment its server closes.
        self._refusing = on
        if on:
            await self._cut_all()

    async def _admit_later(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
        await self._refuse(False)

    async def _close_door(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)  # the socket closes with the next turn of the loop

    async def _cut_all(self) -> None:
        for link in list(self._links):
            link.abort()

    async def _shut_down(self) -> None:
        await self._close_door()
        await self._cut_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close with the next turn of the loop

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self._spawn(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if "path" in self._upstream:
                opened = await asyncio.open_unix_connection(self._upstream["path"], limit=_BUFFER_BYTES)
            else:
                host, port = self._upstream.get("host", "localhost"), self._upstream.get("port", 6379)
                opened = await asyncio.open_connection(host, port, limit=_BUFFER_BYTES)
        except OSError:
            writer.transport.abort()  # the broker is down, and so are we
            return
        link = _Link(client=writer, broker=opened[1])
        self._links.add(link)
        pumps = [self._spawn(self._requests(link, reader)), self._spawn(self._replies(link, opened[0]))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._links.discard(link)
            for end in (link.client, link.broker):
                end.close()  # after what is still in its buffer
            for end in (link.client, link.broker):
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await asyncio.wait_for(end.wait_closed(), _FLUSH_S)
                end.transport.abort()

    async def _requests(self, link: _Link, reader: asyncio.StreamReader) -> None:
        """Forwards commands until the connection ends or a fault ends it."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                raw, words = await _read_command(reader)
                await self._flowing.wait()
                if not words:  # an empty line, which the broker ignores
                    continue
                name = words[0].decode(errors="replace").upper()
                rule = self._rule_for(name, words[1:])
                if rule is not None and rule.fault is Fault.CUT_BEFORE:
                    await _quiet(link)
                    rule.strike()
                    return
                if rule is not None and rule.fault is Fault.HOLD:
                    rule.strike()
                    await _release_of(rule)
                if rule is not None and rule.fault is Fault.DELAY:
                    rule.strike()
                    await asyncio.sleep(rule.delay_s)
                answers = name not in _ANSWER_IN_PUSH_FRAMES
                waits = rule is not None and rule.fault in (Fault.SWALLOW_REPLY, Fault.HOLD_REPLY)
                if answers:
                    link.pending.append(rule if waits else None)
                link.broker.write(raw)
                await link.broker.drain()
                if rule is not None and waits:
                    if not answers:
                        rule.strike()
                        return
                    await _quiet(link)  # nothing behind it reaches the broker; a swallowed reply ends the other pump

    async def _replies(self, link: _Link, reader: asyncio.StreamReader) -> None:
        """Forwards replies until the connection ends or a fault ends it."""
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                parts: list[bytes] = []
                pushed = await _read_reply(reader, parts)
                await self._flowing.wait()
                rule = link.pending[0] if link.pending and not pushed else None
                if rule is not None:
                    rule.strike()
                    if rule.fault is Fault.SWALLOW_REPLY:
                        return
                    await _release_of(rule)
                link.client.write(b"".join(parts))
                await link.client.drain()
                if not pushed and link.pending:
                    link.pending.popleft()
                    link.answered.set()


async def _release_of(rule: Rule) -> None:
    while not rule.released:  # noqa: ASYNC110  (set by a thread that has no loop)
        await asyncio.sleep(0.002)


async def _quiet(link: _Link) -> None:
    """Returns once the broker has answered everything it got on this connection."""
    while link.pending:
        link.answered.clear()
        await link.answered.wait()


async def _read_command(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    """One command, as it came and as words."""
    line = await reader.readuntil(b"\n")
    if not line.startswith(b"*"):
        return line, line.split()
    parts, words = [line], []
    for _ in range(int(line[1:])):
        header = await reader.readuntil(b"\n")
        body = await reader.readexactly(int(header[1:]) + 2)
        parts += [header, body]
        words.append(body[:-2])
    return b"".join(parts), words


async def _read_reply(reader: asyncio.StreamReader, parts: list[bytes]) -> bool:
    """Appends the bytes of one reply to `parts`; returns whether it was a push frame."""
    line = await reader.readuntil(b"\n")
    parts.append(line)
    kind = line[:1]
    if kind in b"$!=":
        size = int(line[1:])
        if size >= 0:
            parts.append(await reader.readexactly(size + 2))
    elif kind in b"*~>%|":
        count = max(0, int(line[1:])) * (2 if kind in b"%|" else 1)
        for _ in range(count):
            await _read_reply(reader, parts)
        if kind == b"|":  # attributes stand before the reply they belong to
            return await _read_reply(reader, parts)
    return kind == b">"
