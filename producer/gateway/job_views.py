"""Jobs as the API shows them to one identity."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from broker_config.job_store import JobStore
from broker_config.latent_geometry import LatentLayout
from broker_config.messages import JobSnapshot, JobStatus
from broker_config.queue_position import positions
from producer.gateway.identity import Identity
from producer.gateway.schemas import AttemptError, Job, JobUrls, OutputFile, Progress


def job_url(name: str) -> str:
    """Path of a job."""
    return f"/v1/decodes/{quote(name, safe='')}"


def show_jobs(store: JobStore, jobs: list[JobSnapshot], identity: Identity) -> list[Job]:
    """These jobs, with their positions. Asks the broker: call it in a thread."""
    places = positions(store.connections, jobs)
    return [show_job(job, identity, position=place) for job, place in zip(jobs, places, strict=True)]


def show_job(job: JobSnapshot, identity: Identity, *, position: int | None = None) -> Job:
    """One job."""
    name = identity.shown(job.job_id)
    url = job_url(name)
    live = not job.status.is_terminal
    request: dict[str, Any] = {}
    if job.request is not None:
        asked = job.request
        copied = ("height", "width", "batch", "num_frames", "fps", "output", "mode", "priority")
        request = {field: getattr(asked, field) for field in copied}
        request["layout"] = LatentLayout(asked.layout)
        request["metadata"] = dict(asked.metadata)
        request["source_job_id"] = identity.shown(asked.source_job_id) if asked.source_job_id else None
    result: dict[str, Any] = {}
    if job.result is not None:
        result = {
            "outputs": [
                OutputFile(
                    url=f"{url}/output/{number}",
                    content_type=item.content_type,
                    extension=item.extension,
                    size_bytes=item.blob.size_bytes,
                    sha256=item.blob.sha256,
                )
                for number, item in enumerate(job.result.artifacts)
            ],
            "timings_s": dict(job.result.timings_s),
            "decoded_by": dict(job.result.decoded_by),
        }
    return Job(
        id=name,
        status=job.status,
        vae=job.vae,
        position=position,
        progress=Progress(done=job.progress_done, total=job.progress_total) if live and job.progress_total else None,
        served=job.served,
        cancel_requested=job.cancel_requested,
        attempts=job.attempts,
        errors=[_error(error) for error in job.errors],
        created_at=_time(job.submitted_ms) or datetime.fromtimestamp(0, UTC),
        started_at=_time(job.started_ms),
        ended_at=_time(job.ended_ms),
        expires_at=_time(job.expires_ms) if job.status is not JobStatus.EXPIRED else None,
        urls=JobUrls(self=url, events=f"{url}/events", cancel=f"{url}/cancel", redecode=f"{url}/redecode"),
        **request,
        **result,
    )


def _error(error: Mapping[str, Any]) -> AttemptError:
    attempt = error.get("attempt")
    return AttemptError(
        code=str(error.get("code", "error")),
        message=str(error.get("message", "")),
        attempt=attempt if isinstance(attempt, int) else None,
    )


def _time(ms: int) -> datetime | None:
    return datetime.fromtimestamp(ms / 1000, UTC) if ms else None
