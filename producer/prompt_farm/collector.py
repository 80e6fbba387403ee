"""Fetches results as their jobs end, in the background, while prompts are denoised.

DESIGN. One thread listens on the broker for jobs that ended (`ended_jobs.heard_of`) and looks at all of them now and
then, for what was not heard of. A few threads fetch, store and note down, since a bucket answers late. A broker or a
store that is away only delays: nothing is given up but jobs that ended badly, and those that are nowhere, neither in
the broker nor in the spool, two looks in a row (the file was set aside; the broker lost its data): nobody would ever
tell of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from broker_config.errors import BrokerError, JobNotFound, LatentqError, SpoolUnavailable
from broker_config.job_record import JobSnapshot
from producer.client import DecodeClient
from producer.ended_jobs import heard_of
from producer.prompt_farm.events import Delayed, Event, failure
from producer.prompt_farm.plan import Task

#: A job that was submitted while the thread listens is noticed after this.
_LISTEN_S: Final = 0.1
#: While nothing can be submitted any more.
_LISTEN_LAST_S: Final = 2.0
#: Every waiting job is looked at this often.
_LOOK_S: Final = 15.0
#: The spool is looked at this often.
_FLUSH_S: Final = 2.0
_CHUNK: Final = 512
_PAUSE_S: Final = 1.0
_FETCHERS: Final = 4


class Collector:
    """Waits for the jobs of a run."""

    def __init__(
        self, client: DecodeClient, *, take: Callable[[Task, JobSnapshot], None], emit: Callable[[Event], None]
    ) -> None:
        """Args:
        client: where the jobs are.
        take: stores the result of a job that ended; called from several threads. A `BrokerError` is tried again.
        emit: told of what fails and what is delayed.
        """
        self._client = client
        self._take = take
        self._emit = emit
        self._changed = threading.Condition()
        self._waiting: dict[str, Task] = {}
        self._spooled: set[str] = set()
        #: Jobs that were nowhere at the last look.
        self._missing: set[str] = set()
        self._busy = 0
        self._closing = False
        self._is_last = False
        self._flushed_s = 0.0
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="farm-fetch")
        self._thread = threading.Thread(target=self._run, name="farm-collect", daemon=True)

    def start(self) -> None:
        """Begins to listen."""
        self._thread.start()

    def add(self, task: Task, *, spooled: bool = False) -> None:
        """Waits for one more job. One in the spool fills no queue: denoising need not wait for it."""
        with self._changed:
            self._waiting[task.submit_id] = task
            if spooled:
                self._spooled.add(task.submit_id)
            self._changed.notify_all()

    def expect_no_more(self) -> None:
        """Says that `add` will not be called again: listening may take longer breaths."""
        self._is_last = True

    @property
    def depth(self) -> int:
        """Jobs that are waited for, or being fetched."""
        with self._changed:
            return len(self._waiting) + self._busy

    def wait_below(self, depth: int, *, timeout_s: float) -> bool:
        """Waits until fewer jobs than `depth` are under way, those in the spool left aside."""
        with self._changed:
            return self._changed.wait_for(
                lambda: len(self._waiting) - len(self._spooled) + self._busy < depth, timeout_s
            )

    def close(self) -> None:
        """Ends the threads; a result that is being stored is stored first."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._fetchers.shutdown(wait=True)

    # The listening thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        looked = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                ids = list(self._waiting)
            try:
                self._flush()
                ended = heard_of(self._client.store, ids, block_s=_LISTEN_LAST_S if self._is_last else _LISTEN_S)
                if not ended and time.monotonic() - looked > _LOOK_S:
                    looked = time.monotonic()
                    ended = self._look(ids)
            except BrokerError as error:
                self._emit(Delayed(stage="decode", code=error.code, message=error.message))
                self._pause()
                continue
            except OSError as error:
                self._emit(Delayed(stage="submit", code=SpoolUnavailable.code, message=f"the spool: {error.strerror}"))
                self._pause()
                continue
            for job_id in ended:
                self._fetchers.submit(self._fetch, self._taken_out(job_id, busy=1))

    def _taken_out(self, job_id: str, *, busy: int = 0) -> Task:
        """The task of a job that is not waited for any more."""
        with self._changed:
            self._spooled.discard(job_id)
            self._busy += busy
            self._changed.notify_all()
            return self._waiting.pop(job_id)

    def _flush(self) -> None:
        """Hands over what waits in the spool: who kept it there may have ended since."""
        spool, now = self._client.spool, time.monotonic()
        if spool is None or now - self._flushed_s < _FLUSH_S:
            return
        self._flushed_s = now
        if not spool.spool.is_empty():
            spool.flush()

    def _look(self, ids: list[str]) -> list[str]:
        found: dict[str, JobSnapshot] = {}
        for start in range(0, len(ids), _CHUNK):
            found |= self._client.store.find(ids[start : start + _CHUNK])
        self._give_up([job_id for job_id in ids if job_id not in found])
        return [job_id for job_id, snapshot in found.items() if snapshot.status.is_terminal]

    def _give_up(self, unknown: list[str]) -> None:
        """Fails those of these jobs that were nowhere at the last look either."""
        spool = self._client.spool
        nowhere = set(unknown) - (spool.spool.holds(unknown) if spool is not None else set())
        for job_id in nowhere & self._missing:
            error = JobNotFound(
                f"job {job_id} is neither in the broker nor in the spool any more: the broker lost it, or its file was "
                "set aside (`latentq spool list` says why)"
            )
            self._emit(failure(self._taken_out(job_id).job_id, "decode", error))
        self._missing = nowhere - self._missing

    def _pause(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, _PAUSE_S)

    # The fetching threads -------------------------------------------------------------------------------

    def _fetch(self, task: Task) -> None:
        try:
            while True:
                try:
                    self._take(task, self._client.store.snapshot(task.submit_id))
                    return
                except BrokerError as error:
                    if self._closing:
                        return  # the job keeps its result for the next run
                    self._emit(Delayed(stage="store", code=error.code, message=error.message))
                    self._pause()
        except Exception as error:
            stage = "decode" if isinstance(error, LatentqError) else "store"
            self._emit(failure(task.job_id, stage, error))
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()
