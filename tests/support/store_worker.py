"""A worker without device: it says to the broker what a worker says, through `JobStore`, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker_config.blob_store import RedisBlobStore
from broker_config.claims import Claim, Outcome, Renewal
from broker_config.decode_result import Artifact, DecodeResult
from broker_config.job_store import JobStore
from broker_config.messages import DecodeRequest, Mode

_tokens = itertools.count()

ERROR = {"code": "decode_failed", "message": "the VAE raised"}


def new_token() -> str:
    """A claim's token; as a worker's, never used twice."""
    return f"token{next(_tokens)}"


@dataclass
class StoreWorker:
    """Claims jobs and ends them as told."""

    store: JobStore
    name: str = "worker-a"
    vaes: Sequence[str] = ("sd",)
    provisional_s: float = 900.0
    blobs: RedisBlobStore = field(init=False)

    def __post_init__(self) -> None:
        self.blobs = RedisBlobStore(self.store.connections, provisional_s=self.provisional_s)

    def claim(
        self, *, token: str | None = None, mode: Mode = Mode.EXACT, max_jobs: int = 1, max_px: int = 0
    ) -> list[Claim]:
        """Claims the next batch."""
        return self.store.claim(
            token=token or new_token(),
            worker=self.name,
            vaes=self.vaes,
            default_mode=mode,
            max_jobs=max_jobs,
            max_px=max_px,
        )

    def claim_one(self) -> Claim:
        """Claims the next job, which must be there."""
        (claim,) = self.claim()
        return claim

    def result(self, claim: Claim, *, data: bytes = b"picture") -> DecodeResult:
        """The result of a job, its artifact stored under job and attempt."""
        ref = self.blobs.put(f"{claim.job_id}.{claim.execution}.0", data)
        picture = Artifact(blob=ref, content_type="image/png", extension="png")
        return DecodeResult(artifacts=(picture,), timings_s={"decode": 0.1}, decoded_by={"worker": self.name})

    def succeed(self, claim: Claim) -> Outcome:
        """Stores an artifact and completes the job."""
        return self.store.complete(claim, self.result(claim))

    def fail(self, claim: Claim, *, retryable: bool = False, elsewhere: bool = False) -> Outcome:
        """Ends the attempt with an error."""
        error = ERROR | {"attempt": claim.attempt, "worker": self.name}
        text = "Traceback …\nDecodeFailed: the VAE raised"
        return self.store.fail(claim, error, retryable=retryable, traceback=text, elsewhere=elsewhere)

    def renew(
        self, *claims: Claim, stage: str = "fetch", done: int = 0, total: int = 0, extend: bool = True
    ) -> list[str]:
        """Renews the leases of these jobs."""
        return self.store.renew(
            self.name,
            [
                Renewal(job_id=c.job_id, execution=c.execution, stage=stage, done=done, total=total, extend=extend)
                for c in claims
            ],
        )

    @staticmethod
    def request(claim: Claim) -> DecodeRequest:
        """What the claimed job asks for."""
        return DecodeRequest.from_wire(claim.message)
