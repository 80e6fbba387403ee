"""From pixels to an ended job: encoding is no work of the device, holds few frames, says what cannot be stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from broker_config import keys
from broker_config.errors import EncodeFailed, OutputTooLarge
from broker_config.settings import Settings
from producer import DecodeClient, JobHandle, JobStatus
from tests.support.thread_worker import ThreadWorker
from tests.support.wait import wait_until
from worker import attempts, finish_stage, stages
from worker.finish_stage import FinishStage
from worker.image_encoding import encode_image
from worker.stages import ChunkStream, HostChunk


def submit(client: DecodeClient, *, side: int = 8, **options: Any) -> JobHandle:
    latents = np.ones((1, 4, side, side), dtype=np.float32)
    return client.submit(latents, vae="sd", provenance=False, **options)


class Held:
    """An encoder that waits to be let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go = threading.Event()
        self.finished = 0
        monkeypatch.setattr(finish_stage, "encode_image", self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        assert self.let_go.wait(60)
        self.finished += 1
        return encode_image(*args, **options)


def test_a_decoded_job_is_no_longer_on_the_device(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies while it encodes must not mark the job: the broker knows with the next renewal."""
    held = Held(monkeypatch)
    admin = client.store.connections.commands
    job = submit(client)
    with ThreadWorker(settings):
        wait_until(lambda: admin.hget(keys.job(job.id), "stage") == b"encode", what="the broker to know")
        held.let_go.set()
        assert job.wait(60).status is JobStatus.SUCCEEDED


def test_few_frames_of_a_clip_wait_for_the_encoders(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the bound between device and encoder would be worth nothing: a clip of 4K frames takes 25 MB each."""
    held, threads, frames = Held(monkeypatch), 2, 40
    taken = most = 0
    encode = FinishStage._encode

    def watched(self: FinishStage, work: Any, stream: Any) -> Any:
        def chunks() -> Iterator[HostChunk]:
            nonlocal taken, most
            for _ in range(frames):
                taken += 1
                most = max(most, taken - held.finished)
                yield HostChunk(torch.zeros((1, 64, 64, 3), dtype=torch.uint8))

        return encode(self, work, chunks())  # type: ignore[arg-type]

    monkeypatch.setattr(FinishStage, "_encode", watched)
    with ThreadWorker(settings, encode_threads=threads):
        job = submit(client)
        wait_until(lambda: taken > 2 * threads, timeout_s=60, what="the frames that may wait")
        held.let_go.set()
        assert job.wait(60).status is JobStatus.SUCCEEDED
    assert taken == frames
    assert most <= 2 * threads + 1


def test_a_broker_that_drops_what_is_stored_fails_the_job_and_says_so(client: DecodeClient, settings: Settings) -> None:
    """It would be stored again and again for ever otherwise."""
    admin = client.store.connections.commands
    tries = 0
    with ThreadWorker(settings) as running:
        complete = running.worker.store.complete

        def evicting(claim: Any, result: Any, inline: Any = None) -> Any:
            nonlocal tries
            tries += 1
            for artifact in result.artifacts:
                admin.delete(keys.blob(artifact.blob.name))
            return complete(claim, result, inline)

        running.worker.store.complete = evicting  # type: ignore[method-assign]
        snapshot = submit(client, side=40, output="tensor").wait(60)  # too large to come along with the success
    assert snapshot.status is JobStatus.FAILED
    assert [error["code"] for error in snapshot.errors] == [EncodeFailed.code] * settings.max_errors
    assert "maxmemory-policy" in snapshot.errors[0]["message"]
    assert tries == 5 * settings.max_errors


def test_an_output_that_the_broker_cannot_hold_fails_the_job_once_and_says_so(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis closes the connection on which it comes, which looks like an outage: it would be sent again for ever."""
    monkeypatch.setattr(attempts, "LARGEST_BYTES", 1 << 20)
    with ThreadWorker(settings):
        snapshot = submit(client, side=40, output="tensor").wait(60)
        assert submit(client, side=8, output="tensor").wait(60).status is JobStatus.SUCCEEDED
    assert snapshot.status is JobStatus.FAILED
    assert [error["code"] for error in snapshot.errors] == [OutputTooLarge.code]
    assert "LATENTQ_BLOB_STORE" in snapshot.errors[0]["message"]


def test_a_stream_tells_of_waiting_until_somebody_takes_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode whose encoder has not begun, since jobs before it cannot be stored, does not hang."""
    waits: list[float] = []
    stream = ChunkStream(on_waiting=waits.append)
    chunks = [HostChunk(torch.zeros((1, 8, 8, 3), dtype=torch.uint8)) for _ in range(9)]

    def fill() -> None:
        for chunk in chunks:
            stream.put(chunk)
        stream.end()

    tries: list[object] = []
    put = stream._queue.put

    def counted(item: Any, timeout: float | None = None) -> None:
        tries.append(item)
        put(item, timeout=timeout)

    monkeypatch.setattr(stream._queue, "put", counted)
    device = threading.Thread(target=fill, name="device")
    device.start()
    wait_until(lambda: len(waits) >= 3, what="the device to wait")
    assert set(waits) == {stages._STREAM_S}
    taken = iter(stream)
    got = [next(taken)]
    told, tried = len(waits), len(tries)
    # the encoder is busy with its first chunk: that is no waiting for others
    wait_until(lambda: len(tries) >= tried + 5, what="the device to try again")
    assert len(waits) <= told + 1
    assert [*got, *taken] == chunks
    device.join(60)
    assert not device.is_alive()
