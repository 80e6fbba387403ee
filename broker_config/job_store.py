"""Jobs in the broker: every change of state, as a typed call of one Lua script.

DESIGN. Each call is one atomic script that is safe to send again, so the driver's retries after a lost reply
do no harm: `submit` compares payload hashes, `claim` carries a token, everything a worker says about an attempt
is fenced by its execution id (the claim's token). A process may be killed between any two calls: before
`submit` nothing but a blob with a TTL exists; after it the job is in the queue; after `claim` it is leased and
comes back when the lease ends; `complete`, `fail` and `cancel` change record, RQ state, ownership and waiters'
stream at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from broker_config import keys, rq_format
from broker_config.blob_store import address
from broker_config.connection import BELL_BLOCK_S, Connections, broker_errors
from broker_config.errors import (
    BlobMissing,
    JobConflict,
    JobNotFound,
    QueueFull,
    StartDeadlinePassed,
    UnsupportedMessage,
    WebhookSecretMissing,
    WorkerCrashed,
)
from broker_config.messages import SCHEMA_VERSION, DecodeRequest, DecodeResult, JobSnapshot, JobStatus, Mode
from broker_config.scripts import source
from broker_config.settings import Settings
from broker_config.webhook_record import outbox_bytes, record_of, webhook_limits
from broker_config.webhook_secrets import entries_of

#: How far behind the head of a queue a claim looks for jobs of the same bucket.
CLAIM_WINDOW: Final = 64
#: Latents up to this size come along with their claim: a 1024² picture's in half precision, with its header.
ALONG_BYTES: Final = 136_000
#: Bytes a picture may take once encoded, for admission: a PNG of a photograph is 1.5 bytes a pixel, a tensor 12.
_RESERVE_BYTES_PER_PX: Final = {"tensor": 12.0, "uint8": 3.0, "png": 2.0, "webp": 0.4, "jpg": 0.6, "mp4": 0.1}

#: Outputs with an artifact for each frame.
_PICTURES: Final = frozenset({"png", "jpg", "webp"})

#: Why a job fails that someone enqueued on our queues with RQ itself, and how long it stays listed unless it says
#: so itself (RQ's own default is a year).
_FOREIGN: Final = (
    "latentq has no record of this job: it was enqueued with RQ itself. Its function was not called. Submit latents "
    "with producer.DecodeClient, and enqueue other functions on queues of your own."
)
_FOREIGN_TTL_S: Final = 7 * 86_400
#: How long latents stay that were refused because the queue is full: longer than a patient caller's pause between
#: two tries, short enough that what is refused cannot fill the broker.
_REFUSED_S: Final = 10.0
#: A preview is looked at while its job runs.
_PREVIEW_MS: Final = 3_600_000


class Outcome(StrEnum):
    """What a worker's word about its attempt came to."""

    COMPLETED = "completed"
    #: This attempt said so before; nothing changed.
    ALREADY = "already"
    #: Another attempt has the job, or it ended otherwise; what we made is not needed.
    LOST = "lost"
    #: An artifact is no longer in the broker: store it again, then complete again.
    ARTIFACT_MISSING = "artifact_missing"
    RETRYING = "retrying"
    FAILED = "failed"
    #: Someone canceled the job meanwhile, so it is not tried again.
    CANCELED = "canceled"


class Claim(NamedTuple):
    """A job a worker holds."""

    job_id: str
    #: Identifies the attempt; every later word about it carries it.
    execution: str
    message: bytes
    #: RQ's own data field, which names the function.
    rq_data: bytes
    #: 1 for the first attempt.
    attempt: int
    crashes: int
    #: The latents' bytes, unchecked, where they are small and lie in the broker; None: they are to be fetched.
    latents: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Reaped:
    """What a look at the leases came to."""

    #: Seconds until leases count again; 0: they count.
    grace_s: float
    #: Job id → requeued, crashed (queued again, counted), failed or canceled.
    jobs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Renewal:
    """What a worker says of one job when it renews the lease."""

    job_id: str
    execution: str
    #: claimed, ready, device, encode or finish; a worker that dies in `device` counts a crash.
    stage: str
    done: int = 0
    total: int = 0
    #: False: its stage is told, the lease only extended if less than half of it is left.
    extend: bool = True


class JobStore:
    """The job state machine of one broker."""

    def __init__(self, connections: Connections, settings: Settings) -> None:
        self.connections = connections
        self.settings = settings
        self._scripts: dict[str, Any] = {}

    def _run(self, name: str, *args: str | bytes | int | float) -> Any:
        script = self._scripts.get(name)
        if script is None:
            script = self._scripts[name] = self.connections.commands.register_script(source(name))
        with broker_errors(self.connections.url):
            return script(args=args)

    # Producers ------------------------------------------------------------------------------------------

    def admit(self, request: DecodeRequest, *, in_broker: bool) -> bool:
        """Asks, before the latents are sent, whether `submit` would take the job. False: it was accepted before.

        Args:
            request: the job.
            in_broker: whether its latents will lie in the broker.

        Raises:
            JobConflict: the id was used for other latents or options.
            QueueFull: a limit of pending jobs, bytes or broker memory is reached.
        """
        size = request.latents.size_bytes
        answer = self._run(
            "admit",
            request.job_id,
            request.payload_hash,
            self._limits(request),
            size,
            self._reserved_bytes(request),
            size if in_broker else 0,
        )
        return self._admitted(answer, request) == "yes"

    def submit(self, request: DecodeRequest, latents: bytes = b"", *, secrets: Sequence[str] = ()) -> bool:
        """Accepts the job. True if it is new, False if this very job was accepted before.

        Args:
            request: the job.
            latents: the bytes of `request.latents`, to be stored with the job; empty: they were stored before.
            secrets: sign its webhook; none: those of its key, or the default ones.

        Raises:
            JobConflict: the id was used for other latents or options.
            QueueFull: a limit of pending jobs, bytes or broker memory is reached.
            BlobMissing: the latents' provisional lifetime ended; store them again, then submit again.
            WebhookSecretMissing: it has a webhook, and nothing to sign it with.
        """
        queue = keys.queue_name(request.vae, request.priority)
        fields = self._record_fields(request, queue)
        if request.webhook is not None:
            fields += ["webhook", record_of(request, self.settings, own_secrets=bool(secrets))]
        answer = self._run(
            "submit",
            request.job_id,
            request.payload_hash,
            self._limits(request),
            address(request.latents),
            latents,
            entries_of(secrets),
            len(fields),
            *fields,
            *rq_format.job_fields(request, queue=queue, connection=self.connections.commands),
        )
        return self._admitted(answer, request) == "accepted"

    def full(self) -> str | None:
        """Which limit keeps even the smallest job out now: jobs, latents or memory; None: none does."""
        answer = self._run("admit", "", "", self._limits(None), 1, 0, 0)
        return answer[1].decode() if answer[0] == b"full" else None

    def _limits(self, request: DecodeRequest | None) -> str:
        settings = self.settings
        return json.dumps(
            {
                "jobs": settings.max_pending_jobs,
                "latents_bytes": settings.max_pending_bytes,
                "watermark": settings.memory_watermark,
                "refused_ms": round(_REFUSED_S * 1000),
            }
            | ({} if request is None else webhook_limits(request, settings))
        )

    def _admitted(self, answer: list[bytes], request: DecodeRequest) -> str:
        """The script's word, if it is not a refusal."""
        word = answer[0].decode()
        if word == "conflict":
            raise JobConflict(
                f"job id {request.job_id} was already used for other latents or options: use a new id",
                job_id=request.job_id,
            )
        if word == "blob_missing":
            raise BlobMissing(f"the latents {request.latents.name} are not in the store", job_id=request.job_id)
        if word == "secret_missing":
            raise WebhookSecretMissing(field="webhook_secret", job_id=request.job_id)
        if word == "full":
            raise _queue_full(answer[1].decode(), request, self.settings)
        return word

    def _reserved_bytes(self, request: DecodeRequest) -> int:
        """Room in the broker that is kept free for the job's artifacts."""
        reserved = request.pixels * _RESERVE_BYTES_PER_PX[request.output]
        if self.settings.blob_store is not None:  # a larger artifact does not lie in the broker
            pictures = request.num_frames if request.output in _PICTURES else 1  # a clip as pictures: one a frame
            reserved = min(reserved, request.batch * pictures * self.settings.blob_threshold_bytes)
        return round(reserved) + outbox_bytes(request)

    def _record_fields(self, request: DecodeRequest, queue: str) -> list[str | bytes | int | float]:
        fields: dict[str, str | bytes | int | float] = {
            "message": request.to_wire(),
            "rq_queue": queue,
            "vae": request.vae,
            "bucket": request.bucket,
            "px": request.pixels,
            "blob": address(request.latents),
            "latents_bytes": request.latents.size_bytes,
            "reserved_bytes": self._reserved_bytes(request),
            "schema": request.schema_version,
            "mode": request.mode or "",
            "retention_ms": round(request.retention_s * 1000),
            "tombstone_ms": round(self.settings.tombstone_s * 1000),
        }
        if request.start_within_s is not None:
            fields["deadline_ms"] = self.now_ms() + round(request.start_within_s * 1000)
        return [part for pair in fields.items() for part in pair]

    def now_ms(self) -> int:
        """Milliseconds since the epoch by the broker's clock."""
        with broker_errors(self.connections.url):
            seconds, micros = self.connections.commands.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def cancel(self, job_id: str, *, execution: str = "") -> str:
        """Cancels a job: `canceled`, `requested` (it is running), or the terminal state it already has.

        `execution`: a worker ends its own attempt; `lost` if the job is not that attempt's any more.

        Raises:
            JobNotFound: no such job.
        """
        word = str(self._run("cancel", job_id, execution).decode())
        if word == "unknown":
            raise JobNotFound(f"no job {job_id}", job_id=job_id)
        return word

    def snapshot(self, job_id: str) -> JobSnapshot:
        """The job as it stands.

        Raises:
            JobNotFound: no such job, or its tombstone is gone too.
        """
        return self.snapshots([job_id])[0]

    def snapshots(self, job_ids: Sequence[str]) -> list[JobSnapshot]:
        """Several jobs, in one round trip.

        Raises:
            JobNotFound: one of them does not exist.
        """
        found = self.find(job_ids)
        for job_id in job_ids:
            if job_id not in found:
                raise _not_found(job_id)
        return [found[job_id] for job_id in job_ids]

    def find(self, job_ids: Sequence[str]) -> dict[str, JobSnapshot]:
        """Those of these jobs that exist, in one round trip, by id."""
        with (
            broker_errors(self.connections.url),
            self.connections.commands.pipeline(transaction=False) as pipe,
        ):
            for job_id in job_ids:
                pipe.hgetall(keys.job(job_id))
                pipe.lrange(keys.attempts(job_id), 0, -1)
            pipe.time()
            *answers, (seconds, micros) = pipe.execute()
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        rows = [
            (job_id, _decode(raw), errors)
            for job_id, raw, errors in zip(job_ids, answers[::2], answers[1::2], strict=True)
        ]
        rows = [row for row in rows if "state" in row[1]]
        ended = {record["state"] for _, record, _ in rows if JobStatus(record["state"]).is_terminal}
        served = self.served({record["vae"] for _, record, _ in rows if record["state"] not in ended}, now_ms=now_ms)
        return {
            job_id: _snapshot(
                job_id, record, errors, served=record["state"] in ended or record["vae"] in served, now_ms=now_ms
            )
            for job_id, record, errors in rows
        }

    def ended(self, job_ids: Sequence[str]) -> list[str]:
        """Those of these jobs that have ended, in one round trip.

        Raises:
            JobNotFound: one of them does not exist.
        """
        with (
            broker_errors(self.connections.url),
            self.connections.commands.pipeline(transaction=False) as pipe,
        ):
            for job_id in job_ids:
                pipe.hget(keys.job(job_id), "state")
            states = pipe.execute()
        for job_id, state in zip(job_ids, states, strict=True):
            if state is None:
                raise _not_found(job_id)
        return [job_id for job_id, state in zip(job_ids, states, strict=True) if JobStatus(state.decode()).is_terminal]

    def served(self, vaes: Iterable[str], *, now_ms: int | None = None) -> set[str]:
        """Those of `vaes` that a live worker serves.

        Args:
            vaes: names in the catalogue.
            now_ms: the broker's time, where it is known.
        """
        names = sorted(vaes)
        if not names:
            return set()
        now = self.now_ms() if now_ms is None else now_ms
        with (
            broker_errors(self.connections.url),
            self.connections.commands.pipeline(transaction=False) as pipe,
        ):
            for vae in names:
                pipe.zcount(keys.serving(vae), now, "+inf")
            counts = pipe.execute()
        return {vae for vae, count in zip(names, counts, strict=True) if count}

    def overdue(self, *, limit: int = 200, places: int = 5_000_000) -> list[str]:
        """Fails queued jobs whose start deadline passed. Returns their ids.

        Args:
            limit: jobs at a time.
            places: entries of queues that may be walked over, some 20 ns each; the rest waits for the next call.
        """
        late = self._run("overdue", rq_format.exc_string(str(StartDeadlinePassed())), limit, places)
        return [job_id.decode() for job_id in late]

    def retire(self, *job_ids: str, limit: int = 100) -> int:
        """Ends the retention of these jobs now, or of all that are due. Returns how many became tombstones.

        Blobs that lost their last owner go: from the broker at once, from outside it with the janitor's next sweep.
        """
        return int(self._run("retire", limit, *job_ids))

    # Workers --------------------------------------------------------------------------------------------

    def claim(
        self,
        *,
        token: str,
        worker: str,
        vaes: Sequence[str],
        default_mode: Mode = Mode.EXACT,
        max_jobs: int = 1,
        max_px: int | Mapping[str, int] = 0,
    ) -> list[Claim]:
        """Takes the next job of these VAEs and, in mode `fast`, up to `max_jobs - 1` behind it in its bucket.

        The same token gets the same answer. `max_px` bounds the pixels of a batch, of all VAEs alike or of each; a job
        larger than that is taken alone.
        """
        settings = self.settings
        deadline = rq_format.exc_string(str(StartDeadlinePassed()))
        rows = self._run(
            "claim",
            token,
            worker,
            round(settings.lease_s * 1000),
            max_jobs,
            CLAIM_WINDOW,
            round(settings.ageing_s * 1000),
            SCHEMA_VERSION,
            deadline,
            default_mode,
            rq_format.exc_string(_FOREIGN),
            _FOREIGN_TTL_S * 1000,
            ALONG_BYTES,
            *(part for vae in vaes for part in (vae, max_px if isinstance(max_px, int) else max_px[vae])),
        )
        return [
            Claim(job_id.decode(), token, message, data, int(attempt), int(crashes), latents or None)
            for job_id, message, data, attempt, crashes, latents in rows
        ]

    def renew(self, worker: str, renewals: Sequence[Renewal]) -> list[str]:
        """Renews leases; one of renewed, adopted, cancel, lost for each."""
        if not renewals:
            return []
        args: list[str | int] = []
        for item in renewals:
            args += [item.job_id, item.execution, item.stage, item.done, item.total, int(item.extend)]
        words = self._run("renew", worker, round(self.settings.lease_s * 1000), *args)
        return [word.decode() for word in words]

    def complete(self, claim: Claim, result: DecodeResult, inline: Mapping[str, bytes] | None = None) -> Outcome:
        """Stores success, once.

        Args:
            claim: the attempt.
            result: what the job became.
            inline: bytes of artifacts by blob name, to be stored with it; the others must be in their store already.
        """
        names = [item.blob.name for item in result.artifacts]
        blobs = [address(item.blob) for item in result.artifacts]
        word = self._run(
            "complete",
            claim.job_id,
            claim.execution,
            result.to_wire(),
            rq_format.return_value(names),
            json.dumps(blobs),
            *(part for pair in (inline or {}).items() for part in pair),
        )
        return Outcome(word.decode())

    def fail(
        self, claim: Claim, error: Mapping[str, Any], *, retryable: bool, traceback: str, elsewhere: bool = False
    ) -> Outcome:
        """Records an attempt's error; queues the job again while attempts are left, else ends it.

        Args:
            claim: the attempt.
            error: the error, as `LatentqError.to_wire` gives it.
            retryable: whether another attempt may go better.
            traceback: for RQ's failed registry.
            elsewhere: whether it may go better on another worker, if there is one.
        """
        word = self._run(
            "fail",
            claim.job_id,
            claim.execution,
            json.dumps(error),
            int(retryable),
            rq_format.exc_string(traceback),
            self.settings.max_errors,
            int(elsewhere),
        )
        return Outcome(word.decode())

    def serve(
        self, worker: str, vaes: Sequence[str], *, ttl_s: float, report: Mapping[str, Any], resting: Sequence[str] = ()
    ) -> None:
        """Says that a worker lives and serves `vaes` for the next `ttl_s`, and `resting` not for now; 0: it leaves."""
        self._run("serve", worker, round(ttl_s * 1000), json.dumps(report), len(vaes), *vaes, *resting)

    def wait_for_work(self, vaes: Sequence[str], *, timeout_s: float = BELL_BLOCK_S) -> bool:
        """Blocks until a doorbell of one of `vaes` rings, or for a second at most. Returns whether it rang."""
        with broker_errors(self.connections.url):
            rung = self.connections.bell.blpop([keys.bell(vae) for vae in vaes], timeout=min(timeout_s, BELL_BLOCK_S))
        return rung is not None

    def release(self, claims: Sequence[Claim]) -> int:
        """Hands claimed jobs back, unmarked and first in line. Returns how many went back."""
        if not claims:
            return 0
        return int(self._run("release", *(part for item in claims for part in (item.job_id, item.execution))))

    def unpark(self, *, limit: int = 1000) -> int:
        """Queues jobs again that were parked because no worker knew their message's version. Returns how many."""
        return int(self._run("unpark", SCHEMA_VERSION, limit))

    def show_preview(self, job_id: str, jpeg: bytes) -> None:
        """Shows a preview of the job to whoever asks for it within the hour."""
        with broker_errors(self.connections.url):
            self.connections.commands.set(keys.preview(job_id), jpeg, px=_PREVIEW_MS)

    def preview(self, job_id: str) -> bytes | None:
        """The job's preview, a JPEG; None: none was shown, or it is gone."""
        with broker_errors(self.connections.url):
            found: bytes | None = self.connections.commands.get(keys.preview(job_id))  # type: ignore[assignment]
        return found

    # Janitor --------------------------------------------------------------------------------------------

    def lead(self, janitor: str, *, ttl_s: float) -> bool:
        """Takes or keeps the lead among janitors for `ttl_s`; 0 steps down. Returns whether it leads."""
        return bool(self._run("lead", janitor, round(ttl_s * 1000)))

    def reap(self, janitor: str, *, quiet_s: float, limit: int = 200) -> Reaped:
        """Queues jobs again whose lease ended, unless the broker or every janitor was away until just now.

        Args:
            janitor: who asks.
            quiet_s: a longer pause since anyone reaped counts as an outage: nothing expires for one lease length.
            limit: jobs at a time.
        """
        answer = self._run(
            "reap",
            janitor,
            round(self.settings.lease_s * 1000),
            round(quiet_s * 1000),
            self.settings.max_crashes,
            rq_format.exc_string(str(WorkerCrashed())),
            limit,
        )
        if answer[0] == b"grace":
            return Reaped(grace_s=int(answer[1]) / 1000, jobs={})
        words = [part.decode() for part in answer[1:]]
        return Reaped(grace_s=0.0, jobs=dict(zip(words[::2], words[1::2], strict=True)))

    def audit(self, job_ids: Sequence[str], *, settle_s: float) -> dict[str, str]:
        """Mends jobs that are on no list, or that someone changed with RQ's own tools. Returns id → what was done."""
        if not job_ids:
            return {}
        words = [part.decode() for part in self._run("audit", round(settle_s * 1000), *job_ids)]
        return dict(zip(words[::2], words[1::2], strict=True))

    def recount(self, *, most: int) -> dict[str, tuple[int, int]]:
        """Sets right what admission counts, unless more than `most` jobs have not ended. Returns what was wrong."""
        told = [part.decode() for part in self._run("recount", most)]
        return {name: (int(old), int(new)) for name, old, new in zip(told[::3], told[1::3], told[2::3], strict=True)}

    def scan(self, cursor: int, *, count: int) -> tuple[int, list[str]]:
        """The next job ids of an endless walk over all records: `(cursor, ids)`; cursor 0: the walk is done."""
        with broker_errors(self.connections.url):
            cursor, found = self.connections.commands.scan(cursor, match=keys.job("*"), count=count)
        prefix = len(keys.job(""))
        return int(cursor), [_text(key)[prefix:] for key in found]


def _queue_full(reason: str, request: DecodeRequest, settings: Settings) -> QueueFull:
    limit = {
        "jobs": f"{settings.max_pending_jobs} jobs are pending (LATENTQ_MAX_PENDING_JOBS)",
        "latents": f"pending latents fill {settings.max_pending_bytes} bytes (LATENTQ_MAX_PENDING_BYTES)",
        "webhooks": f"{settings.webhook_max_pending} webhooks are pending (LATENTQ_WEBHOOK_MAX_PENDING)",
        "receiver": f"{settings.webhook_max_pending // 4} webhooks wait for this receiver, a quarter of "
        "LATENTQ_WEBHOOK_MAX_PENDING",
        "memory": f"stored and expected bytes fill {settings.memory_watermark:.0%} of the broker's maxmemory",
    }[reason]
    return QueueFull(
        f"the queue is full: {limit}; nothing was stored, submit job {request.job_id} again later",
        retry_after_s=5.0,
        job_id=request.job_id,
    )


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"no job {job_id}: the id is wrong, or its tombstone is gone too", job_id=job_id)


def _decode(raw: Mapping[bytes, bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in raw.items()}


def _request_of(message: str) -> DecodeRequest | None:
    """The request, or None where a newer producer wrote it: the job is there all the same."""
    try:
        return DecodeRequest.from_wire(message)
    except UnsupportedMessage:
        return None


def _snapshot(
    job_id: str, record: Mapping[str, str], errors: Sequence[bytes], *, served: bool, now_ms: int
) -> JobSnapshot:
    def number(name: str) -> int:
        return int(record.get(name) or 0)

    status = JobStatus(record["state"])
    if status.is_terminal and 0 < number("expires_ms") < now_ms:
        status = JobStatus.EXPIRED  # due, though the janitor has not come by yet
    message, result = record.get("message"), record.get("result")
    return JobSnapshot(
        job_id=job_id,
        status=status,
        vae=record["vae"],
        request=_request_of(message) if message else None,
        result=DecodeResult.from_wire(result) if result and status is JobStatus.SUCCEEDED else None,
        errors=tuple(json.loads(error) for error in errors),
        attempts=number("attempts"),
        error_count=number("errors"),
        crash_count=number("crashes"),
        submitted_ms=number("submitted_ms"),
        started_ms=number("started_ms"),
        ended_ms=number("ended_ms"),
        expires_ms=number("expires_ms"),
        progress_done=number("done"),
        progress_total=number("total"),
        worker=record.get("worker") or None,
        cancel_requested=record.get("cancel") == "1",
        served=served,
    )
