"""What the gateway answers, as pydantic models: they check nothing we send, and are what the OpenAPI document says."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from broker_config.keys import Priority
from broker_config.latent_geometry import LatentLayout
from broker_config.messages import JobStatus, Mode, Output
from producer.gateway.api_keys import Scope


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
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    expires_at: datetime | None = None
    urls: JobUrls


class JobPage(Schema):
    """Some jobs, newest first."""

    jobs: list[Job]
    next_cursor: str | None = Field(description="For the next page; null: there is none.")


class BatchItem(Schema):
    """What became of one job of a batch: the job, or why not."""

    job: Job | None = None
    error: dict[str, Any] | None = None


class Batch(Schema):
    """What became of each job of a batch, in order."""

    items: list[BatchItem]


class Vae(Schema):
    """One VAE of the catalogue."""

    name: str
    title: str
    vae_class: str
    channels: int
    spatial: int
    temporal: int
    layouts: list[LatentLayout]
    fps: float
    served: bool


class Vaes(Schema):
    """The catalogue."""

    vaes: list[Vae]


class Queue(Schema):
    """One queue: a VAE and a priority."""

    vae: str
    priority: Priority
    queued: int
    processing: int
    parked: int
    failed: int
    oldest_s: float | None
    paused: bool
    workers: int


class Queues(Schema):
    """Every queue that ever had a job."""

    queues: list[Queue]


class Worker(Schema):
    """One live worker."""

    name: str
    vaes: list[str]
    device: str
    busy_share: float | None
    jobs: int
    held: int
    seen_s: float


class Workers(Schema):
    """Every live worker."""

    workers: list[Worker]


class Point(Schema):
    """A quarter of a minute of the charts."""

    at: datetime
    succeeded: int
    failed: int
    canceled: int
    wait_s: float | None
    decode_s: float | None
    encode_s: float | None


class Overview(Schema):
    """What the status page shows."""

    queues: list[Queue]
    workers: list[Worker] | None = Field(description="Null for a key that may not see them.")
    points: list[Point]
    recent: list[Job]
    failed: list[Job]


class Session(Schema):
    """Who is logged in."""

    name: str
    scopes: list[Scope]
    csrf: str | None = Field(description="To be sent as X-CSRF-Token with whatever changes something.")
    needs_key: bool


class Readiness(Schema):
    """Whether jobs can be submitted."""

    ready: bool
    broker: str
    admission: str


class Problem(Schema):
    """Why a request was refused (RFC 9457)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    retryable: bool
    field: str | None = None
    job_id: str | None = None
    error: str
