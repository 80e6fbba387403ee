"""The janitor: returns jobs whose lease ended, ends retention, mends what fell between the lists. Runs without torch.

DESIGN. Any number of janitors may run; one leads, by a lock that is renewed every second and lost after three.
Everything it does is one atomic script for each batch of jobs, so a janitor killed anywhere leaves nothing half done,
and two that believe they lead do no harm. It decides by the broker's clock alone.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

from broker_config import keys
from broker_config.connection import broker_errors, connect
from broker_config.errors import BrokerError, BrokerRefusesWrites, BrokerUnreachable, LatentqError
from broker_config.exit_status import exit_status
from broker_config.job_store import JobStore
from broker_config.logs import configure_logging
from broker_config.settings import Settings, load_settings
from broker_config.tiered_blob_store import TieredBlobStore
from broker_config.webhook_outbox import WebhookOutbox
from worker.blob_sweeper import BlobSweeper

logger = logging.getLogger(__name__)

_TICK_S: Final = 1.0
#: A janitor that falls silent is replaced within three seconds: its lead ends, and the others look often.
_LEAD_S: Final = 2.5
_STANDBY_S: Final = 0.4
#: No janitor for longer than this is an outage: a takeover takes 3 s, a stop and start of `latentq up` a little more.
_QUIET_S: Final = 10.0
#: Jobs in one script, and scripts of a kind in one tick: jobs of a rack that loses power are back within one, and
#: retention ends faster than any fleet decodes.
_BATCH: Final = 200
_ROUNDS: Final = 50
#: How often admission's totals are compared with the jobs, and the most of these: some 1.5 µs each.
_RECOUNT_EVERY_S: Final = 60.0
_RECOUNT_MOST: Final = 10_000
#: Keys looked at in one step of the walk over the records, and how long a tick goes on with steps: a tenth of the
#: broker's time at most. 20,000 ended jobs were 100,000 keys and took 100 steps, 0.43 s in all, so five ticks.
_SCAN_COUNT: Final = 1000
_WALK_S: Final = 0.1
#: A job this young may be between two commands of someone's tool.
_SETTLE_S: Final = 5.0


class Janitor:
    """One janitor process."""

    def __init__(self, store: JobStore, *, name: str, outbox: WebhookOutbox | None = None) -> None:
        """Args:
        store: the jobs.
        name: unique.
        outbox: the deliveries of webhooks; None: another one looks after them.
        """
        self._store = store
        self._outbox = outbox
        self._name = name
        self._stop = threading.Event()
        self._cursor = 0
        self._queued: set[str] = set()
        self._recounted_at = -_RECOUNT_EVERY_S
        #: Whether this janitor leads, as far as it knows.
        self.leads = False

    def stop(self) -> None:
        """Stops soon. Safe from a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Looks after the queue until stopped; waits out a broker that is away."""
        logger.info("janitor %s runs", self._name, extra={"action": "janitor_ready"})
        while not self._stop.is_set():
            try:
                self.leads = self._store.lead(self._name, ttl_s=_LEAD_S)
                if self.leads:
                    self.tick()
            except BrokerError as error:
                logger.warning("janitor waits for the broker: %s", error, extra={"action": "broker_away"})
            self._stop.wait(_TICK_S if self.leads else _STANDBY_S)
        try:
            self._store.lead(self._name, ttl_s=0)
        except BrokerError as error:
            logger.warning("left without a word: %s", error, extra={"action": "leave_failed"})

    def tick(self) -> None:
        """One round: leases, start deadlines, retention, webhooks whose time is over, a part of the audit, admission's
        totals. A part that fails does not stop the others.

        Raises:
            BrokerUnreachable, BrokerRefusesWrites: the broker is away.
        """
        for step in (self._reap, self._end_overdue, self._retire, self._bury, self._audit, self._recount):
            try:
                step()
            except (BrokerUnreachable, BrokerRefusesWrites):
                raise
            except Exception:
                logger.error("a step of the janitor failed", exc_info=True, extra={"action": "janitor_step_failed"})

    def _reap(self) -> None:
        for _ in range(_ROUNDS):
            reaped = self._store.reap(self._name, quiet_s=_QUIET_S, limit=_BATCH)
            for job_id, what in reaped.jobs.items():
                logger.warning(
                    "lease of job %s ended: %s",
                    job_id,
                    what,
                    extra={"action": "lease_ended", "job_id": job_id, "what": what},
                )
            if len(reaped.jobs) < _BATCH:
                return

    def _retire(self) -> None:
        for _ in range(_ROUNDS):
            if self._store.retire(limit=_BATCH) < _BATCH:
                return

    def _end_overdue(self) -> None:
        for job_id in self._store.overdue():
            logger.warning(
                "job %s was not started in time", job_id, extra={"action": "start_deadline_passed", "job_id": job_id}
            )

    def _bury(self) -> None:
        for delivery in self._outbox.bury() if self._outbox is not None else ():
            logger.warning(
                "%s was not delivered in time", delivery, extra={"action": "delivery_given_up", "delivery": delivery}
            )

    def _audit(self) -> None:
        since = time.monotonic()
        while self._audit_some() and time.monotonic() - since < _WALK_S:
            pass

    def _audit_some(self) -> bool:
        """A step of the walk. Returns whether there are more."""
        if self._cursor == 0:
            self._queued = self._ids_in_queues()
        self._cursor, found = self._store.scan(self._cursor, count=_SCAN_COUNT)
        # Most jobs wait in a queue: only the others are worth the broker's time.
        for job_id, what in self._store.audit([i for i in found if i not in self._queued], settle_s=_SETTLE_S).items():
            logger.warning(
                "job %s mended: %s", job_id, what, extra={"action": "job_mended", "job_id": job_id, "what": what}
            )
        return self._cursor != 0

    def _recount(self) -> None:
        if time.monotonic() - self._recounted_at < _RECOUNT_EVERY_S:
            return
        for name, (old, new) in self._store.recount(most=_RECOUNT_MOST).items():
            logger.warning(
                "admission counted %d %s, there are %d",
                old,
                name,
                new,
                extra={"action": "totals_mended", "total": name},
            )
        self._recounted_at = time.monotonic()

    def _ids_in_queues(self) -> set[str]:
        connections = self._store.connections
        with broker_errors(connections.url):
            queues = [key for key in connections.commands.smembers(keys.RQ_QUEUES) if keys.QUEUE_PREFIX.encode() in key]
            ids: set[str] = set()
            for queue in queues:
                start = 0
                while part := connections.commands.lrange(queue, start, start + 9999):
                    ids.update(item.decode(errors="replace") for item in part if isinstance(item, bytes))
                    start += len(part)
        return ids


def _own_name() -> str:
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(3)}"


def run_janitor(settings: Settings) -> None:
    """Runs a janitor in this process until SIGTERM or SIGINT.

    Raises:
        LatentqError: no broker is configured or running.
    """
    name = _own_name()
    connections = connect(settings, name=f"latentq-janitor-{name}")
    outbox = WebhookOutbox(connections, settings)
    janitor = Janitor(JobStore(connections, settings), name=name, outbox=outbox)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: janitor.stop())
    stop = threading.Event()
    sweeper = threading.Thread(
        target=BlobSweeper(TieredBlobStore(connections, settings)).run,
        args=(stop,),
        kwargs={"leads": lambda: janitor.leads},
        name="blob-sweep",
        daemon=True,  # a deletion that hangs must not keep the process; what it left is on the list
    )
    sweeper.start()
    janitor.run()
    stop.set()
    sweeper.join(timeout=_LEAD_S)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m worker.janitor`; returns its exit status: 0 stopped, 2 not startable, 75 the broker is away."""
    argparse.ArgumentParser(prog="latentq janitor", description="Looks after the queue until stopped.").parse_args(argv)
    try:
        settings = load_settings()
        configure_logging(settings)
        run_janitor(settings)
    except LatentqError as error:
        print(f"latentq janitor: {error.message} [{error.code}]", file=sys.stderr)
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
