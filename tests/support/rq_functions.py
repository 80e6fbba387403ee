"""What stock RQ workers call in tests."""

from __future__ import annotations

from collections.abc import Callable

from rq import get_current_job

#: Ids of the jobs whose function was called, in order.
called: list[str] = []
#: Called from inside a running job with its id, to look at the broker meanwhile.
during: Callable[[str], None] | None = None


def _call(job_id: str) -> None:
    called.append(job_id)
    if during is not None:
        during(job_id)


def succeed(job_id: str) -> list[str]:
    """A job that succeeds with the names of its artifacts."""
    _call(job_id)
    return ["artifact"]


def fail(job_id: str) -> None:
    """A job that raises."""
    _call(job_id)
    raise ValueError("the VAE raised")


def fail_first(job_id: str) -> list[str]:
    """A job that raises as long as it may be tried again."""
    _call(job_id)
    job = get_current_job()
    if job is not None and job.retries_left:
        raise ValueError("the VAE raised")
    return ["artifact"]
