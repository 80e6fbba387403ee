"""What a worker says of its attempts: completed, failed, canceled, handed back. Repeated until heard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from broker_config.blob_store import LARGEST_BYTES
from broker_config.claims import Claim, Outcome
from broker_config.decode_result import DecodeResult
from broker_config.errors import EncodeFailed, OutputTooLarge, WorkerError
from broker_config.job_store import JobStore
from broker_config.messages import BlobRef
from broker_config.tiered_blob_store import TieredBlobStore
from worker.leases import LeaseKeeper
from worker.stages import Abandoned, Failure, Patience, is_retryable

logger = logging.getLogger(__name__)

#: Artifacts are stored again when their provisional lifetime ended in an outage; more than a few times is a fault.
_STORE_TRIES: Final = 5


class AttemptReporter:
    """Ends attempts in the broker. Every call is safe to repeat and fenced by the attempt's execution id."""

    def __init__(
        self, store: JobStore, blobs: TieredBlobStore, *, leases: LeaseKeeper, patience: Patience, worker: str
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._leases = leases
        self._patience = patience
        self._worker = worker

    def complete(self, claim: Claim, stored: Callable[[], tuple[DecodeResult, Mapping[str, bytes]]]) -> Outcome:
        """Stores success. `stored` stores the artifacts, each time it is called, and says where; small ones come back
        as bytes by blob name, to be stored together with the success.

        Raises:
            Abandoned: the worker gave up while the broker was away.
            EncodeFailed: the broker drops what is stored.
        """
        for _ in range(_STORE_TRIES):
            result, inline = stored()

            def complete(result: DecodeResult = result, inline: Mapping[str, bytes] = inline) -> Outcome:
                return self._store.complete(claim, result, inline)

            outcome = self._patience.repeat(complete)
            if outcome is not Outcome.ARTIFACT_MISSING:
                break
        else:
            raise EncodeFailed(
                f"the broker lost the artifacts {_STORE_TRIES} times between two commands: check that its "
                "maxmemory-policy is noeviction (`latentq doctor`)"
            )
        self._leases.drop(claim)
        action = "job_completed" if outcome in (Outcome.COMPLETED, Outcome.ALREADY) else "job_not_ours"
        logger.info("job %s: %s", claim.job_id, outcome, extra={"action": action, "job_id": claim.job_id})
        return outcome

    def is_inline(self, data: bytes) -> bool:
        """Whether an artifact may come along with its job's success, instead of `store`."""
        return self._blobs.is_inline(len(data))

    def store(self, name: str, data: bytes) -> BlobRef:
        """Stores an artifact's bytes, for a provisional lifetime, and says where they lie.

        Raises:
            OutputTooLarge: nothing takes so many.
            Abandoned: the worker gave up while the broker was away.
        """
        if len(data) > LARGEST_BYTES and self._blobs.lies_in_broker(len(data)):
            raise OutputTooLarge(
                f"output {name} has {len(data)} bytes, and the broker holds at most {LARGEST_BYTES} in a value: choose "
                "another output, or set LATENTQ_BLOB_STORE everywhere and decode the job again"
            )
        return self._patience.repeat(lambda: self._blobs.put(name, data, past_limit=True))

    def fail(self, claim: Claim, failure: Failure, *, stage: str) -> None:
        """Records an attempt's error."""
        error = failure.error
        wire = error.to_wire() | {
            "attempt": claim.attempt,
            "worker": self._worker,
            "stage": stage,
            "at_ms": self._patience.repeat(self._store.now_ms),
        }
        outcome = self._patience.repeat(
            lambda: self._store.fail(
                claim,
                wire,
                retryable=is_retryable(error),
                traceback=failure.traceback,
                elsewhere=isinstance(error, WorkerError),
            )
        )
        self._leases.drop(claim)
        logger.warning(
            "job %s: attempt %d ended in %s with %s: %s (%s)",
            claim.job_id,
            claim.attempt,
            stage,
            error.code,
            error.message,
            outcome,
            extra={"action": "attempt_failed", "job_id": claim.job_id, "code": error.code},
        )

    def cancel(self, claim: Claim) -> None:
        """Ends a job whose cancel was asked for."""
        word = self._patience.repeat(lambda: self._store.cancel(claim.job_id, execution=claim.execution))
        self._leases.drop(claim)
        logger.info("job %s: %s", claim.job_id, word, extra={"action": "job_canceled", "job_id": claim.job_id})

    def release(self, claims: Sequence[Claim]) -> None:
        """Hands jobs back; where the broker does not answer, their leases end by themselves."""
        try:
            self._patience.repeat(lambda: self._store.release(claims))
        except Abandoned:
            logger.warning("%d jobs left to their leases", len(claims), extra={"action": "release_abandoned"})
        for claim in claims:
            self._leases.drop(claim)

    def skip(self, claim: Claim) -> bool:
        """Whether nothing more should be done for this job: it is lost, or canceled (then it is ended here)."""
        if self._leases.is_lost(claim):
            self._leases.drop(claim)
            return True
        if self._leases.is_canceled(claim):
            self.cancel(claim)
            return True
        return False
