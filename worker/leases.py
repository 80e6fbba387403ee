"""The leases of one worker: which jobs it holds, in which stage, and the thread that renews them.

DESIGN. A lease is renewed while its job is inside the deadline of its stage, so a long decode keeps it and a
hang loses it; on the device it must show progress, too, within the time that others of its kind took many times
over. Renewal runs in a thread of its own: it must go on while the device computes. When the broker does not
answer, renewal is tried again every second; a job whose lease ended meanwhile is taken up again if nobody else
claimed it (`adopted`), and marked lost otherwise. A job past its time is no longer renewed and `on_hang` is
told once: only the end of the process frees a device that hangs. Time in which the broker, or the store of
large blobs, is away does not count, nor does time in which the device waits for encoders: nobody hangs who
waits. Such times may overlap and then count twice, so a stage never has more time left than it had when it
began.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from broker_config.claims import Claim, Renewal
from broker_config.errors import BrokerError
from broker_config.job_store import JobStore

logger = logging.getLogger(__name__)

#: Pause between tries while the broker does not answer.
_OUTAGE_RETRY_S: Final = 1.0
#: An answer that takes longer than this counts as an outage.
_SLOW_ANSWER_S: Final = 5.0
#: Stages in the order a job goes through them: claimed (its latents are read), ready (it waits for the device), device,
#: encode (decoded, on its way to an artifact), finish (stored and completed). `ready` has no deadline.
STAGES: Final = ("claimed", "ready", "device", "encode", "finish")
#: Those in which a job may wait for the broker or a store.
WAITING: Final = tuple(stage for stage in STAGES if stage != "device")


@dataclass(slots=True)
class Held:
    """A job this worker holds."""

    claim: Claim
    stage: str
    #: Time the stage may take, and `time.monotonic()` after which it counts as hung.
    limit_s: float
    deadline: float
    #: How long the job may show no progress in its stage, and `time.monotonic()` after which that counts as hung.
    silence_s: float = math.inf
    silent_until: float = math.inf
    done: int = 0
    total: int = 0
    #: Someone asked to cancel it.
    cancel: bool = False
    #: Another attempt has it, or it ended.
    lost: bool = False
    hung: bool = False
    #: The stage that the broker knows of.
    told: str = ""

    def excuse(self, seconds: float, *, now: float) -> None:
        """The stage waited so long for others until `now`."""
        self.deadline = min(self.deadline + seconds, now + self.limit_s)
        self.silent_until = min(self.silent_until + seconds, now + self.silence_s)

    def is_late(self, now: float) -> bool:
        """Whether it hangs."""
        return now > min(self.deadline, self.silent_until)


class LeaseKeeper:
    """Holds and renews the leases of one worker process."""

    def __init__(
        self,
        store: JobStore,
        *,
        worker: str,
        renew_s: float,
        on_hang: Callable[[Claim, str], None],
        on_beat: Callable[[], None],
    ) -> None:
        """Args:
        store: the broker.
        worker: this worker's name.
        renew_s: time between two renewals.
        on_hang: told once of each job that exceeded its stage's deadline, with the stage.
        on_beat: called with each renewal, to show that the worker lives; may raise BrokerError.
        """
        self._store = store
        self._worker = worker
        self._renew_s = renew_s
        self._on_hang = on_hang
        self._on_beat = on_beat
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        #: Set while the last renewal did not reach the broker.
        self._behind = threading.Event()
        #: `time.monotonic()` of the last renewal that reached the broker.
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        """Starts renewing."""
        self._thread.start()

    def stop(self) -> None:
        """Stops renewing; what is still held stays leased until its lease ends."""
        self._stop.set()
        self._thread.join(timeout=30)

    def hold(self, claims: Sequence[Claim], *, limit_s: float) -> None:
        """Takes freshly claimed jobs in; their first stage may take `limit_s`."""
        deadline = time.monotonic() + limit_s
        with self._lock:
            for claim in claims:
                self._held[claim.job_id] = Held(claim=claim, stage="claimed", limit_s=limit_s, deadline=deadline)

    def enter(self, claims: Iterable[Claim], stage: str, *, limit_s: float = math.inf) -> None:
        """Moves jobs on to a stage, which may take `limit_s`; told to the broker with the next word about any job.

        Two threads may say where a job is (the device is done with it; it is being stored): it never goes back.
        """
        deadline = time.monotonic() + limit_s
        with self._lock:
            for claim in claims:
                held = self._held.get(claim.job_id)
                if held is None or held.claim.execution != claim.execution:
                    continue
                if STAGES.index(stage) >= STAGES.index(held.stage):
                    held.stage, held.limit_s, held.deadline, held.hung = stage, limit_s, deadline, False
                    held.silence_s = held.silent_until = math.inf

    def expect(self, claims: Iterable[Claim], *, within_s: float) -> None:
        """Says that these jobs, on the device, show progress within this time, and again within it after each time."""
        now = time.monotonic()
        with self._lock:
            for claim in claims:
                held = self._held.get(claim.job_id)
                if held is not None and held.claim.execution == claim.execution and held.stage == "device":
                    held.silence_s, held.silent_until = within_s, now + within_s

    def grant(self, seconds: float, *, stages: Collection[str] = STAGES) -> None:
        """Moves the deadlines of what is in these stages: it waited so long for the broker, a store or encoders."""
        now = time.monotonic()
        with self._lock:
            for held in self._held.values():
                if held.stage in stages:
                    held.excuse(seconds, now=now)

    def tell(self, claims: Sequence[Claim]) -> None:
        """Tells the broker these jobs' stage now, and what else changed since. One that is away is told later."""
        ids = {claim.job_id for claim in claims}
        with self._lock:
            held = [
                item
                for id_, item in self._held.items()
                # what is in `finish` is about to end: the word would cross its success
                if id_ in ids or item.stage not in (item.told, "finish")
            ]
        try:
            self._renew(held, extend=False)
        except BrokerError as error:
            logger.warning("stage not told: %s", error, extra={"action": "renew_postponed"})

    def catch_up(self) -> None:
        """After an outage: renews before anything is claimed, so that we do not claim anew what we hold already.

        Raises:
            BrokerError: the broker is still away.
        """
        if self._behind.is_set():
            self._renew(self._in_time())
            self._behind.clear()

    def progress(self, claim: Claim, *, done: int, total: int) -> None:
        """Notes how far a job is; told to the broker with the next renewal."""
        with self._lock:
            held = self._held.get(claim.job_id)
            if held is not None:
                held.done, held.total = done, total
                held.silent_until = time.monotonic() + held.silence_s

    def drop(self, claim: Claim) -> None:
        """Forgets a job that ended or was handed back."""
        with self._lock:
            held = self._held.get(claim.job_id)
            if held is not None and held.claim.execution == claim.execution:
                del self._held[claim.job_id]

    def is_canceled(self, claim: Claim) -> bool:
        """Whether someone asked to cancel the job."""
        with self._lock:
            held = self._held.get(claim.job_id)
            return held is not None and held.cancel

    def is_lost(self, claim: Claim) -> bool:
        """Whether the job is no longer ours."""
        with self._lock:
            held = self._held.get(claim.job_id)
            return held is None or held.lost or held.claim.execution != claim.execution

    def mark_canceled(self, job_id: str) -> None:
        """Notes a cancel that reached this worker by another way (RQ's `stop-job`)."""
        with self._lock:
            if job_id in self._held:
                self._held[job_id].cancel = True

    def held(self, *, outside: str = "") -> list[Claim]:
        """What this worker holds; `outside`: without what is in this stage."""
        with self._lock:
            return [item.claim for item in self._held.values() if item.stage != outside]

    def _run(self) -> None:
        while not self._stop.wait(self._round()):
            pass

    def _round(self) -> float:
        """Renews once. Returns how long to wait before the next time."""
        try:
            self._renew(self._in_time())  # before the beat: nothing may come between a job and its lease
            self._behind.clear()
            self._on_beat()
            self._heard_again()
            return self._renew_s
        except BrokerError as error:
            logger.warning("leases not renewed: %s", error, extra={"action": "renew_failed"})
        except Exception:  # without this thread every long decode would lose its lease
            logger.error("leases not renewed", exc_info=True, extra={"action": "renew_failed"})
        self._behind.set()
        return min(self._renew_s, _OUTAGE_RETRY_S)

    def _in_time(self) -> list[Held]:
        now = min(time.monotonic(), self._heard + self._renew_s + _SLOW_ANSWER_S)
        with self._lock:
            late = [item for item in self._held.values() if item.is_late(now) and not item.hung]
            for item in late:
                item.hung = True
            in_time = [item for item in self._held.values() if not item.hung and not item.lost]
        for item in late:
            self._on_hang(item.claim, item.stage)
        return in_time

    def _renew(self, held: Sequence[Held], *, extend: bool = True) -> None:
        said = [
            Renewal(
                job_id=item.claim.job_id,
                execution=item.claim.execution,
                stage=item.stage,
                done=item.done,
                total=item.total,
                extend=extend,
            )
            for item in held
        ]
        words = self._store.renew(self._worker, said)
        if said:  # else nothing was asked
            self._heard_again()
        with self._lock:
            for item, renewal, word in zip(held, said, words, strict=True):
                item.told = renewal.stage
                if word == "lost" and self._held.get(item.claim.job_id) is item:
                    item.lost = True
                    if item.stage == "finish":
                        continue  # its success crossed this word, or the answer to it will say that it came too late
                    logger.warning("job %s is no longer ours", item.claim.job_id, extra={"action": "lease_lost"})
                elif word == "cancel":
                    item.cancel = True
                elif word == "adopted":
                    logger.info("job %s taken up again", item.claim.job_id, extra={"action": "lease_adopted"})

    def _heard_again(self) -> None:
        """The broker answered: the time in which it did not is added to every deadline."""
        with self._lock:
            now = time.monotonic()
            away_s = now - self._heard - self._renew_s - _SLOW_ANSWER_S
            if away_s > 0:
                for held in self._held.values():
                    held.excuse(away_s, now=now)
            self._heard = now
