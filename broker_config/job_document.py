"""A job as the gateway shows it and webhooks deliver it: one object, wherever a client meets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema

from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from broker_config.keys import Priority
from broker_config.latent_geometry import LatentLayout
from broker_config.messages import Mode, Output


def moment_text(at: datetime) -> str:
    """RFC 3339 in UTC, always with milliseconds: of one length, so that texts sort as the times do."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


#: A time as JSON shows it.
Moment = Annotated[
    datetime,
    PlainSerializer(moment_text, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


class Schema(BaseModel):
    """A model of the API."""

    model_config = ConfigDict(frozen=True)


class OutputFile(Schema):
    """One encoded image, video or tensor."""

    url: str
    content_type: str
    extension: str
    size_bytes: int
    sha256: str


class Progress(Schema):
    """Pictures or frames that are decoded."""

    done: int
    total: int


class AttemptError(Schema):
    """How an attempt ended badly."""

    code: str
    message: str
    attempt: int | None = None


class JobUrls(Schema):
    """Where to go on with a job."""

    self: str
    events: str
    cancel: str
    redecode: str


class Job(Schema):
    """A job as it stands."""

    id: str
    status: JobStatus
    vae: str
    layout: LatentLayout | None = Field(
        None, description="Null once the retention has ended, like all that follows from the request."
    )
    height: int | None = None
    width: int | None = None
    batch: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    output: Output | None = None
    mode: Mode | None = None
    priority: Priority | None = None
    metadata: dict[str, str] = {}
    source_job_id: str | None = None
    position: int | None = Field(None, description="While queued: about how many jobs are before it.")
    progress: Progress | None = None
    served: bool = Field(description="False while no live worker serves the VAE: the job waits for one.")
    cancel_requested: bool = False
    attempts: int
    errors: list[AttemptError] = Field([], description="Of each attempt that ended badly, oldest first.")
    outputs: list[OutputFile] = []
    timings_s: dict[str, float] = {}
    decoded_by: dict[str, Any] = Field(
        {}, description="Weights, dtype, device, mode and more, of a job that succeeded."
    )
    created_at: Moment
    started_at: Moment | None = None
    ended_at: Moment | None = None
    expires_at: Moment | None = None
    urls: JobUrls


def job_url(name: str) -> str:
    """Path of a job."""
    return f"/v1/decodes/{quote(name, safe='')}"


def job_document(job: JobSnapshot, *, shown: Callable[[str], str], position: int | None = None) -> Job:
    """The object of a job.

    Args:
        job: as it stands.
        shown: what the one who sees it calls a job, by the broker's id.
        position: how many jobs are before it, where that is known.
    """
    name = shown(job.job_id)
    url = job_url(name)
    live = not job.status.is_terminal
    request: dict[str, Any] = {}
    if job.request is not None:
        asked = job.request
        copied = ("height", "width", "batch", "num_frames", "fps", "output", "mode", "priority")
        request = {field: getattr(asked, field) for field in copied}
        request["layout"] = LatentLayout(asked.layout)
        request["metadata"] = dict(asked.metadata)
        request["source_job_id"] = shown(asked.source_job_id) if asked.source_job_id else None
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
