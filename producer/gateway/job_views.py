"""Jobs as the API shows them to one identity."""

from __future__ import annotations

from broker_config.job_document import Job, job_document
from broker_config.job_record import JobSnapshot
from broker_config.job_store import JobStore
from broker_config.queue_position import positions
from producer.gateway.identity import Identity


def show_jobs(store: JobStore, jobs: list[JobSnapshot], identity: Identity) -> list[Job]:
    """These jobs, with their positions. Asks the broker: call it in a thread."""
    places = positions(store.connections, jobs)
    return [show_job(job, identity, position=place) for job, place in zip(jobs, places, strict=True)]


def show_job(job: JobSnapshot, identity: Identity, *, position: int | None = None) -> Job:
    """One job."""
    return job_document(job, shown=identity.shown, position=position)
