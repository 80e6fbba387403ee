"""Whether a job is taken: the limits the scripts are told, the room a job is given, and what a refusal means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from broker_config.errors import BlobMissing, JobConflict, QueueFull, WebhookSecretMissing
from broker_config.messages import DecodeRequest
from broker_config.settings import Settings
from broker_config.webhook_record import outbox_bytes, webhook_limits

#: Bytes a picture may take once encoded, for admission: a PNG of a photograph is 1.5 bytes a pixel, a tensor 12.
_RESERVE_BYTES_PER_PX: Final = {"tensor": 12.0, "uint8": 3.0, "png": 2.0, "webp": 0.4, "jpg": 0.6, "mp4": 0.1}
#: Outputs with an artifact for each frame.
_PICTURES: Final = frozenset({"png", "jpg", "webp"})
#: How long latents stay that were refused because the queue is full: longer than a patient caller's pause between
#: two tries, short enough that what is refused cannot fill the broker.
_REFUSED_S: Final = 10.0


def limits(request: DecodeRequest | None, settings: Settings) -> str:
    """What `admit` and `submit` hold a job to, as JSON (`scripts/prelude.lua`, `refusal`); None: the smallest job."""
    return json.dumps(
        {
            "jobs": settings.max_pending_jobs,
            "latents_bytes": settings.max_pending_bytes,
            "watermark": settings.memory_watermark,
            "refused_ms": round(_REFUSED_S * 1000),
        }
        | ({} if request is None else webhook_limits(request, settings))
    )


def reserved_bytes(request: DecodeRequest, settings: Settings) -> int:
    """Room in the broker that is kept free for the job's artifacts."""
    reserved = request.pixels * _RESERVE_BYTES_PER_PX[request.output]
    if settings.blob_store is not None:  # a larger artifact does not lie in the broker
        pictures = request.num_frames if request.output in _PICTURES else 1  # a clip as pictures: one a frame
        reserved = min(reserved, request.batch * pictures * settings.blob_threshold_bytes)
    return round(reserved) + outbox_bytes(request)


def admitted(answer: Sequence[bytes], request: DecodeRequest, settings: Settings) -> str:
    """The word of `admit` or `submit`, if it is not a refusal.

    Raises:
        JobConflict: the id was used for other latents or options.
        BlobMissing: the latents' provisional lifetime ended.
        WebhookSecretMissing: it has a webhook, and nothing to sign it with.
        QueueFull: a limit of pending jobs, bytes or broker memory is reached.
    """
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
        raise _queue_full(answer[1].decode(), request, settings)
    return word


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
