"""What must leave nothing behind: artifacts of a success that was not taken, and claims that got nothing."""

from __future__ import annotations

from typing import Any

import pytest

from broker_config import keys
from broker_config.blob_store import draft
from broker_config.claims import Outcome
from broker_config.decode_result import Artifact, DecodeResult
from broker_config.job_store import JobStore
from broker_config.messages import Output
from tests.support.store_queue import Queue, ids


def test_an_artifact_that_came_along_is_not_kept_when_another_one_is_missing(queue: Queue) -> None:
    queue.submit()
    worker = queue.worker()
    claim = worker.claim_one()
    along, stored = draft("along", b"x" * 10), worker.result(claim).artifacts[0].blob
    picture: dict[str, Any] = {"content_type": "image/png", "extension": "png"}
    result = DecodeResult(
        artifacts=(Artifact(blob=along, **picture), Artifact(blob=stored, **picture)), timings_s={}, decoded_by={}
    )
    queue.admin.delete(keys.blob(stored.name))
    assert queue.store().complete(claim, result, {"along": b"x" * 10}) is Outcome.ARTIFACT_MISSING
    assert not queue.admin.exists(keys.blob("along"))
    worker.result(claim)
    assert queue.store().complete(claim, result, {"along": b"x" * 10}) is Outcome.COMPLETED
    assert queue.admin.get(keys.blob("along")) == b"x" * 10
    assert queue.admin.zcard(keys.owners("along")) == 1


def test_a_late_copy_of_a_claim_that_got_nothing_claims_nothing(queue: Queue) -> None:
    worker = queue.worker()
    assert worker.claim(token="first") == []
    assert worker.claim(token="second") == []
    job = queue.submit()
    assert worker.claim(token="first") == []
    assert worker.claim(token="second") == []
    assert ids(worker.claim(token="third")) == [job]


@pytest.mark.parametrize(
    ("output", "expected_bytes"),
    [  # the threshold for each artifact: a picture of a clip is one, and so is the clip
        (Output.PNG, 2 * 81 * 1_000_000),
        (Output.MP4, 2 * 1_000_000),
        (Output.TENSOR, 2 * 1_000_000),
    ],
)
def test_room_is_kept_free_for_every_artifact_that_may_lie_in_the_broker(
    queue: Queue, output: Output, expected_bytes: int
) -> None:
    settings = queue.settings.model_copy(update={"blob_store": "file:///unused", "blob_threshold_bytes": 1_000_000})
    size: dict[str, Any] = {"height": 1080, "width": 1920, "num_frames": 81, "batch": 2}
    request = queue.request(output=output, shape=(2, 16, 21, 135, 240), **size)
    JobStore(queue.connections, settings).submit(request)
    assert queue.totals()["reserved_bytes"] == expected_bytes
    queue.store().cancel(request.job_id)
