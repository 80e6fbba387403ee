"""What the gateway answers, as pydantic models: they check nothing we send, and are what the OpenAPI document says."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from broker_config.job_document import Job as Job
from broker_config.job_document import Moment
from broker_config.job_document import Schema as Schema
from broker_config.keys import Priority
from broker_config.latent_geometry import LatentLayout
from broker_config.webhook_deliveries import DeliveryState
from broker_config.webhooks import WebhookEvent
from producer.gateway.api_keys import Scope


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

    at: Moment
    succeeded: int
    failed: int
    canceled: int
    wait_s: float | None
    decode_s: float | None
    encode_s: float | None


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
    items: list[BatchItem] | None = Field(
        default=None, description="Of a batch that broke off: what became of the jobs before."
    )
    error: str


class DeliveryAttempt(Schema):
    """One try to deliver a webhook."""

    at: Moment
    status: int | None = Field(description="Null: there was no answer.")
    duration_ms: int
    error: str | None = Field(description="Null: it went well. Never the receiver's own words.")


class DeliveryUrls(Schema):
    """What can be done with a delivery."""

    self: str
    redeliver: str
    enable: str


class Delivery(Schema):
    """One event of a job on its way to a receiver."""

    id: str = Field(description="The `webhook-id`, the same for every attempt.")
    event: WebhookEvent
    state: DeliveryState
    job_id: str | None = Field(description="Null for a ping.")
    receiver: str = Field(description="Scheme, host and port.")
    url: str | None = Field(description="Null for who did not submit the job: it may hold the receiver's secrets.")
    reason: str | None = Field(description="Why it was given up.")
    created_at: Moment
    next_attempt_at: Moment | None
    ended_at: Moment | None
    attempts: list[DeliveryAttempt] = Field(description="The last fifty, oldest first.")
    urls: DeliveryUrls


class DeliveryPage(Schema):
    """Some deliveries."""

    deliveries: list[Delivery]
    next_cursor: str | None = Field(description="For the next page; null: there is none.")


class WebhookSecret(Schema):
    """A secret that signs webhooks; the secret itself is never shown."""

    id: str
    added_at: Moment
    valid_until: Moment | None = Field(description="Null: until it is removed or followed by another.")


class WebhookSecrets(Schema):
    """The secrets that sign one key's webhooks, the newest first."""

    secrets: list[WebhookSecret]


class WebhookState(Schema):
    """How webhooks go. The numbers are null for a key that sees its own only."""

    pending: int | None = Field(default=None, description="On their way.")
    dead_letters: int | None = None
    couriers: int | None = Field(default=None, description="Live ones.")
    overdue_s: float | None = Field(default=None, description="For how long the oldest one that could be tried waits.")
    dead: list[Delivery] = Field(description="The last ones that were given up.")


class Overview(Schema):
    """What the status page shows."""

    queues: list[Queue]
    workers: list[Worker] | None = Field(description="Null for a key that may not see them.")
    webhooks: WebhookState
    points: list[Point]
    recent: list[Job]
    failed: list[Job]
