"""The courier's loop: takes what is due, sends it, tells the outbox what became of it.

DESIGN. One asyncio loop sends; calls to the broker run in a few threads beside it, because they are the same scripts
that everyone else uses. A thread waits at the broker's bell and wakes the loop. Order: claim (under a lease, with a
token) → read job and secrets → send → settle. Killed anywhere, a courier leaves deliveries whose lease ends; another
one sends them under the same id, so a receiver may see a message twice and never two ids for one event. Which receiver
is served, how many at a time, and which one is left alone, is decided in the broker (`scripts/deliver.lua`), so several
couriers act as one. Nothing is kept here that another courier would need.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from broker_config.errors import BlobError, BlobStoreUnavailable, BrokerError, ConfigurationError, JobNotFound
from broker_config.job_record import JobSnapshot
from broker_config.job_store import JobStore
from broker_config.settings import Settings
from broker_config.tiered_blob_store import TieredBlobStore
from broker_config.webhook_outbox import Attempt, DueDelivery, Settled, WebhookOutbox
from broker_config.webhook_secrets import WebhookSecrets
from broker_config.webhooks import WebhookEvent, pause_before_next_s
from worker.courier.attempt import Sender, Verdict
from worker.courier.links import OutputLinks
from worker.courier.message import message_of
from worker.courier.settings import CourierSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_THREADS: Final = 8
#: A name is looked up in a thread, and one whose name servers do not answer keeps its thread after its attempt has
#: ended: glibc gives up after 10 to 40 seconds (resolv.conf: 5 s, twice, for each server), an attempt after 15. Threads
#: are made as they are needed; asyncio's own, six on two cores, would all be taken by six such names.
_LOOKUPS_PER_CALL: Final = 4
#: A look without a bell: what becomes due by time rings none.
_TICK_S: Final = 0.5
#: Pause after the broker did not answer.
_AWAY_S: Final = 1.0
#: How long a courier that is silent counts as alive.
_ALIVE_S: Final = 10.0


class Courier:
    """One courier. Make and run it in one loop."""

    def __init__(
        self,
        jobs: JobStore,
        settings: Settings,
        own: CourierSettings,
        *,
        outbox: WebhookOutbox,
        sender: Sender,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Args:
        jobs: reads the jobs that messages are about.
        settings: with `public_url` and `link_key`.
        own: of this courier.
        outbox: has the deliveries.
        sender: sends them.
        jitter: from 0 to 1; how much longer a pause is.

        Raises:
            ConfigurationError: links cannot be signed.
        """
        self._jobs = jobs
        self._settings = settings
        self._own = own
        self._outbox = outbox
        self._sender = sender
        self._jitter = jitter
        self._secrets = WebhookSecrets(jobs.connections)
        self._blobs = TieredBlobStore(jobs.connections, settings)
        self._links = OutputLinks(settings, self._blobs)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="courier")
        self._wake = asyncio.Event()
        self._active: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Delivers until `stop`; then ends what is under way."""
        loop = asyncio.get_running_loop()
        # used by the session to look names up
        loop.set_default_executor(ThreadPoolExecutor(_LOOKUPS_PER_CALL * self._own.concurrency, "courier-lookup"))
        ended = threading.Event()
        bell = threading.Thread(target=self._listen, args=(loop, ended), name="courier-bell", daemon=True)
        bell.start()
        stopper = asyncio.create_task(self._wake_at(stop), name="courier-stop")
        logger.info("courier %s runs", self._own.name, extra={"action": "courier_ready", "courier": self._own.name})
        try:
            while not stop.is_set():
                self._wake.clear()
                if await self._take(stop) == 0:
                    await self._until_woken()
            logger.info("courier stops", extra={"action": "courier_stopping", "under_way": len(self._active)})
            if self._active:
                await asyncio.wait(self._active)  # each ends within its timeout
            await self._leave()
        finally:
            ended.set()
            stopper.cancel()
            for task in self._active:
                task.cancel()
            await asyncio.to_thread(self._threads.shutdown, wait=True)
            self._blobs.close()

    async def _wake_at(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._wake.set()

    def _listen(self, loop: asyncio.AbstractEventLoop, ended: threading.Event) -> None:
        while not ended.is_set():
            try:
                rung = self._outbox.wait_for_work()
            except BrokerError:
                rung = False
                ended.wait(_AWAY_S)  # the loop's own calls say that it is away
            if rung and not ended.is_set():
                loop.call_soon_threadsafe(self._wake.set)

    async def _until_woken(self) -> None:
        try:
            async with asyncio.timeout(_TICK_S):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _take(self, stop: asyncio.Event) -> int:
        """Claims as much as there is room for, and begins to send it. Returns how much it was."""
        room = self._own.concurrency - len(self._active)
        if room <= 0:
            return 0
        token = uuid.uuid4().hex
        found: list[DueDelivery] = []
        while not stop.is_set():
            try:
                found = await self._call(
                    self._outbox.claim,
                    token=token,
                    courier=self._own.name,
                    lease_s=self._own.lease_s,
                    most=room,
                    most_per_receiver=self._own.per_receiver,
                    alive_s=_ALIVE_S,
                )
                break
            except BrokerError as error:  # the same token again: whatever was claimed is not claimed twice
                logger.warning("courier waits for the broker: %s", error, extra={"action": "broker_away"})
                await asyncio.sleep(_AWAY_S)
        for due in found:
            task = asyncio.create_task(self._deliver(due), name=f"deliver-{due.id}")
            self._active.add(task)
            task.add_done_callback(self._done)
        return len(found)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._active.discard(task)
        self._wake.set()

    async def _deliver(self, due: DueDelivery) -> None:
        try:
            body, secrets = await self._call(self._prepare, due)
        except BrokerError as error:
            logger.warning(
                "delivery %s waits: %s", due.id, error, extra={"action": "delivery_waits", "delivery": due.id}
            )
            return  # its lease ends, and it is due again
        except Exception:
            logger.error(
                "no message for %s", due.id, exc_info=True, extra={"action": "delivery_broke", "delivery": due.id}
            )
            verdict = _broken(due)
        else:
            verdict = await self._sender.send(due, body, secrets)
        await self._settle(due, verdict)

    def _prepare(self, due: DueDelivery) -> tuple[str, list[str]]:
        """The message of a delivery and the secrets that sign it."""
        job = self._snapshot(due)
        links = [] if job is None else self._links.of(job, now_ms=due.claimed_ms)

        def read(number: int) -> bytes | None:
            assert job is not None
            assert job.result is not None
            try:
                return self._blobs.get(job.result.artifacts[number].blob)
            except (BlobError, BlobStoreUnavailable, ConfigurationError):
                return None  # there is a link to it all the same

        body = message_of(due, job, public_url=self._settings.public_url or "", links=links, read=read)
        return body, [item.secret for item in self._secrets.of(due.signer)]

    def _snapshot(self, due: DueDelivery) -> JobSnapshot | None:
        if due.event is WebhookEvent.PING:
            return None
        try:
            return self._jobs.snapshot(due.job_id)
        except JobNotFound:
            return None

    async def _settle(self, due: DueDelivery, verdict: Verdict) -> None:
        stops = verdict.word == "stopped" and due.event is not WebhookEvent.PING
        settled = await self._tell(
            self._outbox.settle,
            due,
            verdict.attempt,
            word="stopped" if stops else "failed" if verdict.word == "stopped" else verdict.word,
            pause_s=pause_before_next_s(
                due.event, tries=due.tries + 1, jitter=self._jitter(), retry_after_s=verdict.retry_after_s
            ),
            answered=verdict.answered,
        )
        facts = {"delivery": due.id, "job_id": due.job_id, "receiver": due.receiver, "status": verdict.attempt.status}
        if settled in (Settled.DEAD, Settled.DROPPED):
            logger.warning(
                "%s is given up: %s", due.id, verdict.attempt.error, extra={"action": "delivery_given_up", **facts}
            )
        elif verdict.word != "delivered":
            logger.info("%s failed: %s", due.id, verdict.attempt.error, extra={"action": "delivery_failed", **facts})
        else:
            logger.debug("%s is delivered", due.id, extra={"action": "delivered", **facts})

    async def _leave(self) -> None:
        try:
            await self._call(self._outbox.leave, self._own.name)
        except BrokerError as error:
            logger.warning("left without a word: %s", error, extra={"action": "leave_failed"})

    async def _tell(self, call: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """Tells the broker something until it hears, or until the lease is over: another courier has it then."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._own.lease_s
        while True:
            try:
                return await self._call(call, *args, **options)
            except BrokerError as error:
                if loop.time() > deadline:
                    logger.warning("what became of it is not told: %s", error, extra={"action": "settle_failed"})
                    return None
                await asyncio.sleep(_AWAY_S)

    async def _call(self, call: Callable[..., T], *args: Any, **options: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **options))


def _broken(due: DueDelivery) -> Verdict:
    attempt = Attempt(at_ms=due.claimed_ms, status=None, duration_ms=0, error="no message could be made: see the log")
    return Verdict(word="failed", attempt=attempt, answered=None)
