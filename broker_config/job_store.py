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
from typing import Any, Final

from broker_config import keys, rq_format
from broker_config.admission import admitted, limits, reserved_bytes
from broker_config.answers import pipelined, readable, text, time_ms
from broker_config.blob_store import address
from broker_config.claims import Claim, Outcome, Reaped, Renewal
from broker_config.connection import BELL_BLOCK_S, Connections, broker_errors
from broker_config.decode_result import DecodeResult
from broker_config.errors import JobNotFound, StartDeadlinePassed, WorkerCrashed
from broker_config.job_record import JobSnapshot, decoded, record_fields, snapshot_of
from broker_config.job_status import JobStatus
from broker_config.messages import SCHEMA_VERSION, DecodeRequest, Mode
from broker_config.scripts import source
from broker_config.settings import Settings
from broker_config.webhook_secrets import entries_of

#: How far behind the head of a queue a claim looks for jobs of the same bucket.
CLAIM_WINDOW: Final = 64
#: Latents up to this size come along with their claim: a 1024² picture's in half precision, with its header.
ALONG_BYTES: Final = 136_000

#: Why a job fails that someone enqueued on our queues with RQ itself, and how long it stays listed unless it says
#: so itself (RQ's own default is a year).
_FOREIGN: Final = (
    "latentq has no record of this job: it was enqueued with RQ itself. Its function was not called. Submit latents "
    "with producer.DecodeClient, and enqueue other functions on queues of your own."
)
_FOREIGN_TTL_S: Final = 7 * 86_400
#: A preview is looked at while its job runs.
_PREVIEW_MS: Final = 3_600_000


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
            limits(request, self.settings),
            size,
            reserved_bytes(request, self.settings),
            size if in_broker else 0,
        )
        return admitted(answer, request, self.settings) == "yes"

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
        fields = record_fields(
            request,
            self.settings,
            queue=queue,
            own_secrets=bool(secrets),
            now_ms=None if request.start_within_s is None else self.now_ms(),
        )
        answer = self._run(
            "submit",
            request.job_id,
            request.payload_hash,
            limits(request, self.settings),
            address(request.latents),
            latents,
            entries_of(secrets),
            len(fields),
            *fields,
            *rq_format.job_fields(request, queue=queue, connection=self.connections.commands),
        )
        return admitted(answer, request, self.settings) == "accepted"

    def full(self) -> str | None:
        """Which limit keeps even the smallest job out now: jobs, latents or memory; None: none does."""
        answer = self._run("admit", "", "", limits(None, self.settings), 1, 0, 0)
        return answer[1].decode() if answer[0] == b"full" else None

    def now_ms(self) -> int:
        """Milliseconds since the epoch by the broker's clock."""
        with broker_errors(self.connections.url):
            return time_ms(self.connections.commands.time())

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
        with pipelined(self.connections) as pipe:
            for job_id in job_ids:
                pipe.hgetall(keys.job(job_id))
                pipe.lrange(keys.attempts(job_id), 0, -1)
            pipe.time()
            *answers, now = readable(pipe)
        now_ms = time_ms(now)
        rows = [
            (job_id, decoded(raw or {}), errors or [])
            for job_id, raw, errors in zip(job_ids, answers[::2], answers[1::2], strict=True)
        ]
        rows = [row for row in rows if "state" in row[1]]
        ended = {record["state"] for _, record, _ in rows if JobStatus(record["state"]).is_terminal}
        served = self.served({record["vae"] for _, record, _ in rows if record["state"] not in ended}, now_ms=now_ms)
        return {
            job_id: snapshot_of(
                job_id, record, errors, served=record["state"] in ended or record["vae"] in served, now_ms=now_ms
            )
            for job_id, record, errors in rows
        }

    def ended(self, job_ids: Sequence[str]) -> list[str]:
        """Those of these jobs that have ended, in one round trip.

        Raises:
            JobNotFound: one of them does not exist.
        """
        with pipelined(self.connections) as pipe:
            for job_id in job_ids:
                pipe.hget(keys.job(job_id), "state")
            states = readable(pipe)
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
        with pipelined(self.connections) as pipe:
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
        return int(cursor), [text(key, errors="replace")[prefix:] for key in found]


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"no job {job_id}: the id is wrong, or its tombstone is gone too", job_id=job_id)
