"""Jobs are listed in the order in which they were accepted, however many there are and however long each is kept."""

from __future__ import annotations

import pytest
import redis

from broker_config import job_list, keys
from broker_config.job_list import JobList
from broker_config.job_status import JobStatus
from producer import DecodeClient
from tests.operations.conftest import Made


@pytest.fixture
def jobs(client: DecodeClient) -> JobList:
    return JobList(client.store.connections)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds that a few jobs reach: three are too many to be put in order, and a page looks at four."""
    monkeypatch.setattr(job_list, "_FEW", 2)
    monkeypatch.setattr(job_list, "_LOOKED_AT", 4)
    monkeypatch.setattr(job_list, "_CHUNK", 2)


def every(jobs: JobList, *, limit: int, status: JobStatus | None = None, vae: str | None = None) -> list[str]:
    """Ids of all pages, one after the other."""
    ids: list[str] = []
    before = None
    for _ in range(50):
        page = jobs.page(status=status, vae=vae, limit=limit, before=before)
        assert len(page.rows) <= limit
        ids += [row.job_id for row in page.rows]
        before = page.before
        if before is None:
            return ids
    raise AssertionError(f"the pages do not end: {ids}")


def test_a_job_that_is_kept_for_a_short_time_is_listed_before_older_ones_that_are_kept_longer(
    made: Made, jobs: JobList
) -> None:
    for number in range(3):
        made.succeeded(f"long-{number}", retention_s=86_400)
    made.succeeded("short", retention_s=60)  # in RQ's registry it is behind the others
    made.succeeded("last", retention_s=86_400)
    expected = ["last", "short", "long-2", "long-1", "long-0"]
    for status in (None, JobStatus.SUCCEEDED):
        assert [row.job_id for row in jobs.newest(status=status)] == expected
        assert every(jobs, limit=2, status=status) == expected


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("limit", [1, 2, 3, 20])
def test_pages_have_every_job_once_whatever_is_asked_for(made: Made, jobs: JobList, limit: int) -> None:
    for number in range(5):
        made.failed(f"f{number}")
    for number in range(9):
        made.queued(f"q{number}", "sd")
    failed, queued = [f"f{number}" for number in (4, 3, 2, 1, 0)], [f"q{number}" for number in range(8, -1, -1)]
    assert every(jobs, limit=limit) == queued + failed
    assert every(jobs, limit=limit, status=JobStatus.FAILED) == failed, "behind more others than one page looks at"
    assert every(jobs, limit=limit, status=JobStatus.QUEUED) == queued
    assert every(jobs, limit=limit, vae="sdxl") == failed
    assert every(jobs, limit=limit, vae="sd", status=JobStatus.FAILED) == []
    assert [row.job_id for row in jobs.newest(status=JobStatus.FAILED, limit=2)] == ["f4", "f3"]
    assert jobs.newest(status=JobStatus.FAILED, limit=2, pages=1) == [], "nine others come before"


def test_an_entry_goes_with_the_retention_and_with_a_record_that_someone_deleted(
    made: Made, jobs: JobList, client: DecodeClient, admin: redis.Redis
) -> None:
    for name in ("acked", "deleted", "stays"):
        made.succeeded(name)
    client.job("acked").ack()
    assert {name.decode() for name, _ in admin.zscan_iter(keys.SUBMITTED)} == {"deleted", "stays"}
    admin.delete(keys.job("deleted"))
    assert [row.job_id for row in jobs.newest()] == ["stays"]
    assert admin.zrange(keys.SUBMITTED, 0, -1) == [b"stays"]
