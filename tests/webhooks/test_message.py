"""The message: the job's object, whole where it fits, below 20 kB always."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from broker_config.decode_result import Artifact, DecodeResult
from broker_config.job_record import JobSnapshot
from broker_config.job_status import JobStatus
from broker_config.messages import BlobRef, DecodeRequest, Output
from broker_config.webhook_outbox import DueDelivery
from broker_config.webhooks import WebhookEvent
from worker.courier.message import message_of

DUE = DueDelivery(
    id="msg_k_abcdefgh_cat_succeeded",
    token="t",
    job_id="k_abcdefgh_cat",
    event=WebhookEvent.SUCCEEDED,
    url="https://hooks.example/",
    receiver="https://hooks.example",
    signer="default",
    inline=False,
    at_ms=1_700_000_000_123,
    claimed_ms=1_700_000_100_000,
    tries=0,
    progress_done=0,
    progress_total=0,
)
PUBLIC = "https://queue.example/"


def snapshot(*sizes: int, metadata: dict[str, str] | None = None, error: str = "") -> JobSnapshot:
    """A job of a key that made artifacts of these sizes."""
    blob = BlobRef(store="redis", name="b", sha256="ab" * 32, size_bytes=1)
    request = DecodeRequest(
        job_id=DUE.job_id, vae="sd", layout="unpacked", latents=blob, shape=(1, 4, 8, 8), dtype="float32", height=64,
        width=64, batch=max(1, len(sizes)), num_frames=1, fps=8.0, output=Output.PNG, metadata=metadata or {},
    )  # fmt: skip
    artifacts = tuple(
        Artifact(
            blob=BlobRef(store="redis", name=f"a{number}", sha256="cd" * 32, size_bytes=size),
            content_type="image/png",
            extension="png",
        )
        for number, size in enumerate(sizes)
    )
    return JobSnapshot(
        job_id=DUE.job_id, status=JobStatus.SUCCEEDED, vae="sd", request=request,
        result=DecodeResult(artifacts=artifacts, timings_s={"decode": 1.0}, decoded_by={"device": "cpu"}),
        errors=({"code": "decode_failed", "message": error, "attempt": 1},) if error else (), attempts=1, error_count=0,
        crash_count=0, submitted_ms=1, started_ms=2, ended_ms=3, expires_ms=4, progress_done=0, progress_total=0,
        worker="w", cancel_requested=False, served=True,
    )  # fmt: skip


def sent(due: DueDelivery, job: JobSnapshot, **options: Any) -> dict[str, Any]:
    """The message as a receiver reads it; it is short enough."""
    links = [f"https://queue.example/{number}" for number in range(len(job.result.artifacts) if job.result else 0)]
    text = message_of(due, job, public_url=PUBLIC, links=links, **options)
    assert len(text.encode()) < 20_000
    message: dict[str, Any] = json.loads(text)
    return message


def inline(due: DueDelivery) -> DueDelivery:
    return DueDelivery(**{name: getattr(due, name) for name in due.__slots__} | {"inline": True})


def test_a_job_is_called_what_its_own_client_calls_it_and_its_urls_are_whole() -> None:
    message = sent(DUE, snapshot(10))
    data = message["data"]
    assert message["timestamp"] == "2023-11-14T22:13:20.123Z"
    assert data["id"] == "cat"
    assert data["urls"]["self"] == "https://queue.example/v1/decodes/cat"
    assert data["outputs"][0]["url"] == "https://queue.example/0"
    assert data["decoded_by"] == {"device": "cpu"}
    assert "left_out" not in data


def test_what_makes_it_too_long_is_left_out_the_least_useful_first_and_named() -> None:
    large = {"prompt": "x" * 12_000}
    data = sent(DUE, snapshot(10, metadata=large, error="y" * 3000))["data"]
    assert data["metadata"] == large
    data = sent(DUE, snapshot(10, metadata=large, error="y" * 9000))["data"]
    assert data["left_out"] == ["decoded_by", "metadata"]
    assert data["metadata"] == {}
    assert data["errors"][0]["message"] == "y" * 9000
    data = sent(DUE, snapshot(10, metadata=large, error="ÿ" * 12_000))["data"]
    assert data["left_out"] == ["decoded_by", "metadata", "errors"]


def test_of_very_many_outputs_the_first_ones_are_there_as_many_as_fit() -> None:
    message = sent(DUE, snapshot(*range(1, 500)))
    data = message["data"]
    assert data["left_out"][-1] == "outputs"
    assert [output["size_bytes"] for output in data["outputs"]] == list(range(1, len(data["outputs"]) + 1))
    one_more = len(json.dumps(data["outputs"][0], separators=(",", ":")))
    assert len(json.dumps(message, separators=(",", ":"))) + one_more + 10 > 20_000


@pytest.mark.parametrize(("size", "fits"), [(10_000, True), (15_000, False)])
def test_a_small_artifact_travels_along_if_asked(size: int, fits: bool) -> None:
    content = bytes(range(256)) * 100
    job = snapshot(size, 6)
    read = lambda number: content[: (size, 6)[number]]  # noqa: E731
    assert all("inline" not in output for output in sent(DUE, job, read=read)["data"]["outputs"])
    first, second = sent(inline(DUE), job, read=read)["data"]["outputs"]
    assert ("inline" in first) is fits
    assert base64.b64decode(second["inline"]) == content[:6]
    if fits:
        assert base64.b64decode(first["inline"]) == content[:size]


def test_an_artifact_that_cannot_be_read_now_is_linked_all_the_same() -> None:
    (output,) = sent(inline(DUE), snapshot(10), read=lambda number: None)["data"]["outputs"]
    assert "inline" not in output
    assert output["url"] == "https://queue.example/0"
