"""Receives webhooks: checks who sent them, does each thing once, answers at once, and fetches the pictures.

`WEBHOOK_SECRET=whsec_… python examples/webhook_receiver.py --port 8080 --folder pictures`

A message that was verified is stored before it is answered, under its `webhook-id`: the same message again changes
nothing, and what was not yet fetched when the receiver stopped is fetched when it starts again.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from standardwebhooks import Webhook, WebhookVerificationError

#: Messages have less than 20 kB.
MAX_BYTES = 64 * 1024
#: Before what went wrong is tried again, in seconds: at first, doubled each time, and at most.
PAUSE_S = 1.0
LONGEST_PAUSE_S = 300.0
#: Answers of a link that will never open again.
GONE = (403, 404, 410)
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Inbox:
    """Messages that came in, each once. A write takes a millisecond, so it may block the loop."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS inbox (id TEXT PRIMARY KEY, message TEXT NOT NULL, done INTEGER)")

    def take(self, message_id: str, message: str) -> bool:
        """Stores a message; False: it is there already."""
        return self._db.execute("INSERT OR IGNORE INTO inbox VALUES (?, ?, 0)", (message_id, message)).rowcount == 1

    def open_messages(self) -> list[tuple[str, str]]:
        """Those with work left."""
        return self._db.execute("SELECT id, message FROM inbox WHERE done = 0 ORDER BY rowid").fetchall()

    def finish(self, message_id: str) -> None:
        """Remembers that nothing is left to do."""
        self._db.execute("UPDATE inbox SET done = 1 WHERE id = ?", (message_id,))


class Receiver:
    """The handler, and the task that does the work."""

    def __init__(self, secrets: list[str], folder: Path) -> None:
        self._verifiers = [Webhook(secret) for secret in secrets]
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._inbox = Inbox(folder / "inbox.sqlite")
        self._bell = asyncio.Event()
        #: Messages that went wrong: when each is tried again, by the loop's clock, and the pause before that.
        self._later: dict[str, tuple[float, float]] = {}

    async def receive(self, request: web.Request) -> web.Response:
        """`POST /`. What is not signed with our secret, or is older than five minutes, is refused."""
        body = await request.read()
        if not any(self._verifies(verifier, body, request) for verifier in self._verifiers):
            raise web.HTTPUnauthorized
        if self._inbox.take(request.headers["webhook-id"], body.decode()):
            self._bell.set()
        return web.Response(status=204)

    @staticmethod
    def _verifies(verifier: Webhook, body: bytes, request: web.Request) -> bool:
        try:
            verifier.verify(body, dict(request.headers))
        except (WebhookVerificationError, ValueError):
            return False
        return True

    async def work(self) -> None:
        """Does what is left to do, forever."""
        now = asyncio.get_running_loop().time
        async with aiohttp.ClientSession() as session:
            while True:
                self._bell.clear()
                for message_id, text in self._inbox.open_messages():
                    if message_id not in self._later or self._later[message_id][0] <= now():
                        await self._try(session, message_id, text)
                next_at = min((at for at, _ in self._later.values()), default=None)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._bell.wait(), None if next_at is None else max(0.0, next_at - now()))

    async def _try(self, session: aiohttp.ClientSession, message_id: str, text: str) -> None:
        """Does what a message asks for; whatever goes wrong with it must not end the work on the others."""
        try:
            await self._handle(session, json.loads(text))
            self._inbox.finish(message_id)
            self._later.pop(message_id, None)
        except Exception as error:
            pause_s = min(LONGEST_PAUSE_S, 2 * self._later[message_id][1]) if message_id in self._later else PAUSE_S
            self._later[message_id] = (asyncio.get_running_loop().time() + pause_s, pause_s)
            # The words of what went wrong with a link have the link, which opens the output for whoever reads them.
            words = type(error).__name__ if isinstance(error, aiohttp.ClientError) else repr(error)
            print(f"{message_id}: {words}, trying again in {pause_s:g} s", flush=True)

    async def _handle(self, session: aiohttp.ClientSession, message: dict[str, Any]) -> None:
        """What to do about a message. Doing it twice must be harmless: we may stop between this and `finish`."""
        job = message["data"]
        if message["type"] == "job.succeeded":
            for number, output in enumerate(job["outputs"]):
                await self._store(session, job["id"], number, output)
        print(f"{message['type']} {job['id']}", flush=True)

    async def _store(self, session: aiohttp.ClientSession, job: str, number: int, output: dict[str, Any]) -> None:
        if not NAME.fullmatch(job) or not NAME.fullmatch(output["extension"]):
            return  # it becomes a file's name
        path = self._folder / f"{job}-{number}.{output['extension']}"
        if "inline" in output:
            data = base64.b64decode(output["inline"])
        else:  # a link that needs no key
            async with session.get(output["url"]) as answer:
                if answer.status in GONE:
                    print(f"output {number} of {job} is gone: status {answer.status}", flush=True)
                    return
                answer.raise_for_status()
                data = await answer.read()
        part = path.with_suffix(".part")
        part.write_bytes(data)
        part.replace(path)  # whoever sees it sees all of it


def build_app(receiver: Receiver) -> web.Application:
    """The receiver as an application."""
    app = web.Application(client_max_size=MAX_BYTES)
    app.router.add_post("/", receiver.receive)

    async def working(app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(receiver.work(), name="work")
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app.cleanup_ctx.append(working)
    return app


async def main() -> None:
    """Serves until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--folder", type=Path, default=Path("pictures"))
    asked = parser.parse_args()
    runner = web.AppRunner(build_app(Receiver(os.environ["WEBHOOK_SECRET"].split(","), asked.folder)))
    await runner.setup()
    await web.TCPSite(runner, asked.host, asked.port).start()
    print(f"receiving at http://{asked.host}:{runner.addresses[0][1]}/", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
