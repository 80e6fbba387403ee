"""Looking at a store outside the broker, and letting time pass for what lies there.

The broker's clock cannot be moved, so a test moves the times that are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from broker_config import keys
from broker_config.external_store import ExternalStore
from broker_config.messages import BlobRef, DecodeRequest
from producer import DecodeClient, JobHandle


def names_in(store: ExternalStore) -> set[str]:
    """Names of the blobs in a store."""
    return {blob.name for blob in store.listing()}


def latents_of(job: JobHandle) -> BlobRef:
    """Where a job's latents lie."""
    request = job.snapshot().request
    assert request is not None
    return request.latents


def lapse(admin: Any, ref: BlobRef) -> None:
    """Lets the time pass at which an unowned blob is no longer kept. What a live job owns has none."""
    score = admin.zscore(keys.external(ref.store), ref.name)
    assert score is not None
    if score != float("inf"):
        admin.zadd(keys.external(ref.store), {ref.name: 1})


def end_retention(admin: Any, *jobs: JobHandle) -> None:
    """Lets the retention of ended jobs pass, owners' keys included."""
    for job in jobs:
        snapshot = job.snapshot()
        assert snapshot.status.is_terminal
        assert snapshot.request is not None
        refs = [
            snapshot.request.latents,
            *(item.blob for item in (snapshot.result.artifacts if snapshot.result else ())),
        ]
        for ref in refs:
            owners = keys.owners(f"{ref.store}/{ref.name}")
            admin.zadd(owners, {job.id: 1}, xx=True)
            (_, last), *_ = admin.zrange(owners, 0, 0, desc=True, withscores=True)
            if last == 1:
                admin.delete(owners)
                admin.zadd(keys.external(ref.store), {ref.name: 1}, xx=True)
        admin.zadd(keys.RETENTION, {job.id: 1})


class BeforeSubmit:
    """Does something between storing the latents and the submit, once."""

    def __init__(self, client: DecodeClient, act: Callable[[DecodeRequest], object]) -> None:
        self._submit = client.store.submit
        self._act = act
        self.requests: list[DecodeRequest] = []
        client.store.submit = self  # type: ignore[method-assign]

    def __call__(self, request: DecodeRequest, latents: bytes = b"", *, secrets: Sequence[str] = ()) -> bool:
        self.requests.append(request)
        if len(self.requests) == 1:
            self._act(request)
        return self._submit(request, latents, secrets=secrets)
