"""A job's record: its fields as `submit` writes them, and the snapshot that is read from it.

The scripts add the others (docs/redis-keys.md has them all).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker_config.admission import reserved_bytes
from broker_config.blob_store import address
from broker_config.decode_result import DecodeResult
from broker_config.errors import UnsupportedMessage
from broker_config.job_status import JobStatus
from broker_config.messages import DecodeRequest
from broker_config.settings import Settings
from broker_config.webhook_record import record_of


def record_fields(
    request: DecodeRequest, settings: Settings, *, queue: str, own_secrets: bool, now_ms: int | None
) -> list[str | bytes | int | float]:
    """What a new job's record says, as names and values in turn.

    Args:
        request: the job.
        settings: how long its tombstone stays, and what its webhook may take.
        queue: where RQ lists it.
        own_secrets: whether it brings secrets of its own for its webhook.
        now_ms: the broker's time, of a job with a start deadline.
    """
    fields: dict[str, str | bytes | int | float] = {
        "message": request.to_wire(),
        "rq_queue": queue,
        "vae": request.vae,
        "bucket": request.bucket,
        "px": request.pixels,
        "blob": address(request.latents),
        "latents_bytes": request.latents.size_bytes,
        "reserved_bytes": reserved_bytes(request, settings),
        "schema": request.schema_version,
        "mode": request.mode or "",
        "retention_ms": round(request.retention_s * 1000),
        "tombstone_ms": round(settings.tombstone_s * 1000),
    }
    if request.start_within_s is not None:
        assert now_ms is not None
        fields["deadline_ms"] = now_ms + round(request.start_within_s * 1000)
    if request.webhook is not None:
        fields["webhook"] = record_of(request, settings, own_secrets=own_secrets)
    return [part for pair in fields.items() for part in pair]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSnapshot:
    """A job as it stood at one moment."""

    job_id: str
    status: JobStatus
    vae: str
    #: None once the job is a tombstone, and where a newer producer wrote a message this process cannot read.
    request: DecodeRequest | None
    #: None unless succeeded.
    result: DecodeResult | None
    #: Error of each attempt that ended badly, oldest first: `{code, message, attempt, worker, …}`.
    errors: tuple[Mapping[str, Any], ...]
    #: How often it was claimed, ended with an error, ended with a dead process.
    attempts: int
    error_count: int
    crash_count: int
    #: Milliseconds since the epoch by the broker's clock; 0: not yet.
    submitted_ms: int
    started_ms: int
    ended_ms: int
    expires_ms: int
    #: Units done and in all (frames, or pictures), where known.
    progress_done: int
    progress_total: int
    #: The worker of the last attempt.
    worker: str | None
    #: Whether a cancel was asked for and has not happened yet.
    cancel_requested: bool
    #: False when the job has not ended and no live worker serves its VAE (then it waits for one).
    served: bool


def decoded(raw: Mapping[bytes, bytes]) -> dict[str, str]:
    """A record as text."""
    return {name.decode(): value.decode() for name, value in raw.items()}


def _request_of(message: str) -> DecodeRequest | None:
    """The request, or None where a newer producer wrote it: the job is there all the same."""
    try:
        return DecodeRequest.from_wire(message)
    except UnsupportedMessage:
        return None


def snapshot_of(
    job_id: str, record: Mapping[str, str], errors: Sequence[bytes], *, served: bool, now_ms: int
) -> JobSnapshot:
    """The snapshot a record gives.

    Args:
        job_id: the job.
        record: its record, with a `state`.
        errors: its attempts' errors as JSON, oldest first.
        served: whether it has ended, or a live worker serves its VAE.
        now_ms: the broker's time.
    """

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
