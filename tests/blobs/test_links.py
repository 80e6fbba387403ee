"""Links in webhooks: of the bucket itself where it can make them, else of the gateway."""

from __future__ import annotations

import dataclasses
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from pydantic import SecretStr

from broker_config.decode_result import Artifact, DecodeResult
from broker_config.job_record import JobSnapshot
from broker_config.job_store import JobStore
from broker_config.link_signing import LinkSigner
from broker_config.settings import Settings
from broker_config.tiered_blob_store import TieredBlobStore
from producer import DecodeClient
from tests.support.store_worker import StoreWorker
from worker.courier.links import OutputLinks

SMALL, LARGE = b"thumbnail", b"p" * 5000
KEY = "k" * 32
Open = Callable[[Settings], TieredBlobStore]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"public_url": "https://queue.example/", "link_key": SecretStr(KEY)})


@pytest.fixture
def job(client: DecodeClient, store: JobStore, tiers: TieredBlobStore) -> JobSnapshot:
    """A job with an artifact in the broker and one outside it."""
    handle = client.submit(np.zeros((1, 4, 8, 8), np.float32), vae="sd", job_id="cat")
    claim = StoreWorker(store).claim_one()
    blobs = [tiers.put(f"cat.{number}", data) for number, data in enumerate((SMALL, LARGE))]
    artifacts = tuple(Artifact(blob=blob, content_type="image/png", extension="png") for blob in blobs)
    store.complete(claim, DecodeResult(artifacts=artifacts, timings_s={}, decoded_by={}))
    return handle.snapshot()


def assert_of_gateway(link: str, job: JobSnapshot, number: int) -> None:
    """It opens this output at the gateway, until the end of its retention."""
    parts = urlsplit(link)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    assert f"{parts.scheme}://{parts.netloc}{parts.path}" == f"https://queue.example/v1/decodes/cat/output/{number}"
    assert query["expires"] == str(job.expires_ms // 1000)
    LinkSigner([KEY], "https://queue.example").check(parts.path, now_s=job.expires_ms / 1000 - 2, **query)


def test_a_store_that_hangs_holds_up_nobody_who_only_points_to_it(
    job: JobSnapshot, settings: Settings, open_tiers: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TieredBlobStore, "_open", lambda self: pytest.fail("the store was asked"))
    small, large = OutputLinks(settings, open_tiers(settings)).of(job, now_ms=job.ended_ms)
    assert_of_gateway(small, job, 0)
    assert "cat" in large


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_bucket_is_linked_under_the_address_that_this_process_has_for_it(
    job: JobSnapshot, settings: Settings, open_tiers: Open
) -> None:
    """Workers may reach it by another one than those who receive links; it is known by its id."""
    elsewhere = settings.model_copy(update={"s3_endpoint": "https://s3.example.com"})
    _, large = OutputLinks(elsewhere, open_tiers(elsewhere)).of(job, now_ms=job.ended_ms)
    assert large.startswith("https://s3.example.com/")


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_what_lies_in_a_bucket_is_linked_there_and_what_lies_in_the_broker_at_the_gateway(
    job: JobSnapshot, settings: Settings, tiers: TieredBlobStore
) -> None:
    small, large = OutputLinks(settings, tiers).of(job, now_ms=job.ended_ms)
    assert_of_gateway(small, job, 0)
    assert large.startswith(f"{settings.s3_endpoint}/")
    with urllib.request.urlopen(large, timeout=10) as answer:
        assert answer.read() == LARGE
    query = parse_qs(urlsplit(large).query)
    lasts_s = (job.expires_ms - job.expires_ms % 1000 - job.ended_ms) // 1000
    assert abs(int(query["X-Amz-Expires"][0]) - lasts_s) <= 1
    assert query["X-Amz-SignedHeaders"] == ["host"]  # and the method: GET


@pytest.mark.parametrize("place", ["s3"], indirect=True)
@pytest.mark.parametrize(
    ("change", "lasts_s"), [({"s3_session_token": SecretStr("temporary")}, 3600), ({}, 8 * 86_400)]
)
def test_a_presigned_url_that_would_end_before_the_output_is_not_used(
    change: dict[str, Any], lasts_s: int, job: JobSnapshot, settings: Settings, open_tiers: Open
) -> None:
    longer = dataclasses.replace(job, expires_ms=job.ended_ms + lasts_s * 1000)
    changed = settings.model_copy(update=change)
    links = OutputLinks(changed, open_tiers(changed)).of(longer, now_ms=job.ended_ms)
    for number, link in enumerate(links):
        assert_of_gateway(link, longer, number)


@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_a_folder_is_linked_at_the_gateway(job: JobSnapshot, settings: Settings, tiers: TieredBlobStore) -> None:
    for number, link in enumerate(OutputLinks(settings, tiers).of(job, now_ms=job.ended_ms)):
        assert_of_gateway(link, job, number)
