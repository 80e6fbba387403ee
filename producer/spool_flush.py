"""From the spool to the broker: at a person's word, and by itself when the broker is back.

DESIGN. `SpoolingSubmits` stands between a client's submits and the broker. A submit that the broker does not take goes
to the spool; from then on a thread tries every now and then, and while it has heard nothing of the broker, further
submits go straight to the spool, so that a GPU does not wait for a dead line at each prompt. The thread ends when the
spool is empty. It is a daemon: what it had not handed over when the process ends is still in the spool.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from broker_config.errors import (
    BlobMissing,
    BlobStoreUnavailable,
    BrokerError,
    ConfigurationError,
    InvalidJob,
    JobConflict,
    LatentqError,
    QueueFull,
    SpoolUnavailable,
    UnsupportedMessage,
)
from broker_config.job_store import JobStore
from broker_config.tiered_blob_store import TieredBlobStore
from producer.spool import Spool, SpoolEntry
from producer.submit_attempt import SubmitAttempt

logger = logging.getLogger(__name__)

#: What a submit with a spool does not raise: the same call may succeed later.
TO_SPOOL: Final = (BrokerError, BlobMissing)
#: Jobs of one flush that a full queue refuses before the flush gives up: the first may only be too large.
_FULL_TRIES: Final = 3
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 5.0
#: `close` waits this long for a handing-over that is under way.
_CLOSE_S: Final = 5.0


@dataclass(kw_only=True, slots=True)
class FlushReport:
    """What a flush came to."""

    #: Jobs the broker has now; some it may have had before.
    sent: list[str] = field(default_factory=list)
    #: Files that were set aside, and why.
    aside: list[tuple[Path, str]] = field(default_factory=list)
    #: Files left where they are for a newer latentq.
    newer: list[Path] = field(default_factory=list)
    #: Why something was left; None: nothing was.
    stopped_by: LatentqError | None = None
    #: Why the store of large blobs was not asked any more; None: it was.
    store_away: LatentqError | None = None


def flush(spool: Spool, *, store: JobStore, blobs: TieredBlobStore) -> FlushReport:
    """Hands over what waits in the spool, oldest first. Safe beside other flushes, and to be killed anywhere."""
    report = FlushReport()
    refused = 0
    spool.sweep()
    for entry in spool.entries():
        if report.store_away is not None and not blobs.lies_in_broker(entry.size_bytes):
            continue
        with spool.claimed(entry) as mine:
            if not mine:
                continue
            try:
                _hand_over(entry, spool, report, store=store, blobs=blobs)
            except (BlobStoreUnavailable, ConfigurationError) as error:
                report.store_away = report.stopped_by = error
            except QueueFull as error:
                report.stopped_by = error
                refused += 1
                if refused == _FULL_TRIES:
                    break
            except LatentqError as error:
                report.stopped_by = error
                break
    return report


def _hand_over(
    entry: SpoolEntry, spool: Spool, report: FlushReport, *, store: JobStore, blobs: TieredBlobStore
) -> None:
    try:
        request, tensor, secrets = spool.read(entry)
        SubmitAttempt(request, tensor, store=store, blobs=blobs, secrets=secrets).once()
    except UnsupportedMessage:
        report.newer.append(entry.path)
        logger.warning(
            "a newer latentq wrote %s: it stays in the spool",
            entry.path.name,
            extra={"action": "spool_newer", "job_id": entry.job_id},
        )
    except (InvalidJob, JobConflict) as error:
        where = spool.set_aside(entry, f"{error.message} [{error.code}]")
        report.aside.append((where, error.message))
        logger.error(
            "%s was set aside: %s",
            entry.path.name,
            error.message,
            extra={"action": "spool_set_aside", "job_id": entry.job_id, "code": error.code},
        )
    else:
        spool.discard(entry)
        report.sent.append(entry.job_id)
        logger.info("job %s left the spool", entry.job_id, extra={"action": "spool_sent", "job_id": entry.job_id})


class SpoolingSubmits:
    """The submits of one client, with its spool behind them. Thread-safe."""

    def __init__(self, spool: Spool, *, store: JobStore, blobs: TieredBlobStore) -> None:
        self.spool = spool
        self._store = store
        self._blobs = blobs
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._away: BrokerError | BlobMissing | None = None
        self._store_away: BlobStoreUnavailable | None = None
        if not spool.is_empty():  # what an earlier process left
            self._flush_later()

    def submit(self, attempt: SubmitAttempt, hand_over: Callable[[], None]) -> None:
        """`hand_over()`, or into the spool with it.

        Raises:
            SpoolUnavailable: neither the broker nor the spool took it.
        """
        away = self.away_for(attempt)
        if away is not None:
            self.keep(attempt, away)
            return
        try:
            hand_over()
        except TO_SPOOL as error:
            self.keep(attempt, error)

    def away_for(self, attempt: SubmitAttempt) -> BrokerError | BlobMissing | None:
        """Why the broker is not asked to take a job for now; None: it is asked."""
        if self._away is not None or self._blobs.lies_in_broker(attempt.request.latents.size_bytes):
            return self._away
        return self._store_away

    def keep(self, attempt: SubmitAttempt, error: BrokerError | BlobMissing) -> None:
        """Writes a job down that the broker did not take because of `error`.

        Raises:
            SpoolUnavailable: the folder did not take it.
        """
        try:
            self.spool.keep(attempt.request, attempt.tensor, secrets=attempt.secrets)
        except SpoolUnavailable as failed:
            raise SpoolUnavailable(
                f"{failed.message}; and the broker does not take it: {error.message}", job_id=attempt.job_id
            ) from failed
        if isinstance(error, BlobStoreUnavailable):
            self._store_away = error  # the broker takes what is small enough for it
        elif not isinstance(error, QueueFull):
            self._away = error
        logger.warning(
            "job %s waits in the spool: %s",
            attempt.job_id,
            error.message,
            extra={"action": "spool_kept", "job_id": attempt.job_id, "code": error.code},
        )
        self._flush_later()

    def flush(self) -> FlushReport:
        """Hands over what waits, now."""
        report = flush(self.spool, store=self._store, blobs=self._blobs)
        if (
            report.stopped_by is None
            or isinstance(report.stopped_by, QueueFull)
            or report.stopped_by is report.store_away
        ):
            self._away = None
        if report.store_away is None:
            self._store_away = None
        return report

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        thread = self._thread
        if thread is not None:
            thread.join(_CLOSE_S)

    def _flush_later(self) -> None:
        with self._lock:
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="spool-flush", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        told: str | None = None
        while not self._closing.wait(pause_s):
            try:
                report = self.flush()
                done = report.stopped_by is None
                code = None if report.stopped_by is None else report.stopped_by.code
                if report.stopped_by is not None and code != told:
                    logger.warning(
                        "the spool %s is not empty yet: %s",
                        self.spool.folder,
                        report.stopped_by.message,
                        extra={"action": "spool_waits", "folder": str(self.spool.folder), "code": code},
                    )
                told = code
                with self._lock:
                    if done and (report.newer or self.spool.is_empty()):
                        self._thread = None
                        return
            except OSError as error:
                done = False
                logger.error(
                    "the spool %s cannot be read: %s",
                    self.spool.folder,
                    error.strerror,
                    extra={"action": "spool_unreadable", "folder": str(self.spool.folder)},
                )
            pause_s = _FIRST_PAUSE_S if done else min(2 * pause_s, _LONGEST_PAUSE_S)
