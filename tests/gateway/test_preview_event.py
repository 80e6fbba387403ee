"""Server-sent events of a job with `preview=true`: the preview comes among them, once."""

from __future__ import annotations

import base64

import numpy as np
from safetensors.numpy import save

from tests.gateway.test_job_api import stream
from tests.support.gateways import RunningGateway
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until

BODY = save({"latents": np.ones((1, 4, 2, 2), dtype=np.float32)})
TYPE = {"Content-Type": "application/vnd.safetensors"}


def put(gateway: RunningGateway, name: str, query: str) -> int:
    return gateway.ask("PUT", f"/v1/decodes/{name}?vae=sd{query}", data=BODY, headers=TYPE).status_code


def test_a_preview_is_an_event_once_and_the_end_follows(gateway: RunningGateway, worker: StoreWorker) -> None:
    assert put(gateway, "watched", "&preview=true") in (201, 202)
    events = stream(gateway, "/v1/decodes/watched/events")
    assert next(events)[0] == "queued"
    claim = worker.claim_one()
    assert worker.request(claim).preview == "taesd"
    worker.store.show_preview("watched", b"a JPEG")
    _, shown = next((kind, shown) for kind, shown in events if kind == "preview")
    assert shown == {"id": "watched", "content_type": "image/jpeg", "data": base64.b64encode(b"a JPEG").decode()}
    worker.succeed(claim)
    rest = [kind for kind, _ in events]
    assert rest[-1] == "succeeded"
    assert "preview" not in rest


def test_a_job_that_asks_for_none_has_none(gateway: RunningGateway, worker: StoreWorker) -> None:
    assert put(gateway, "plain", "") in (201, 202)
    worker.succeed(worker.claim_one())
    wait_until(lambda: gateway.get("/v1/decodes/plain").json()["status"] == "succeeded")
    assert [kind for kind, _ in stream(gateway, "/v1/decodes/plain/events")] == ["succeeded"]
