"""Jobs share a batch only in mode fast, only in one bucket; one that fails takes no other along."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from broker_config.errors import DecodeFailed, EncodeFailed
from broker_config.settings import Settings
from producer import DecodeClient, JobHandle, JobStatus
from tests.support.thread_worker import ThreadWorker
from worker.finish_stage import FinishStage
from worker.stages import ChunkStream, Work

POISONED = 77.0


def submit(client: DecodeClient, number: float = 0.0, *, side: int = 8, **options: object) -> JobHandle:
    latents = np.full((1, 4, side, side), number, dtype=np.float32)
    return client.submit(latents, vae="sd", provenance=False, **options)  # type: ignore[arg-type]


def wait_all(client: DecodeClient, jobs: list[JobHandle]) -> None:
    assert len(list(client.as_completed(jobs, timeout=60))) == len(jobs)


def test_mode_exact_never_mixes_jobs(client: DecodeClient, settings: Settings) -> None:
    jobs = [submit(client, number) for number in range(4)]
    with ThreadWorker(settings, mode="exact") as running:
        wait_all(client, jobs)
    assert [shape[0] for shape in running.gate.calls] == [1, 1, 1, 1]
    assert {job.result().decoded_by["batch_jobs"] for job in jobs} == {1}


def test_mode_fast_decodes_jobs_of_one_bucket_together(client: DecodeClient, settings: Settings) -> None:
    same = [submit(client, number, output="tensor") for number in range(4)]
    other = submit(client, side=16)
    with ThreadWorker(settings, mode="fast") as running:
        wait_all(client, [*same, other])
    assert sorted(shape[0] for shape in running.gate.calls) == [1, 4]
    assert {job.result().decoded_by["batch_jobs"] for job in same} == {4}
    # Each job got its own picture out of the batch: equal latents would make equal ones.
    assert len({job.array().tobytes() for job in same}) == 4


def test_a_batch_stays_within_the_pixel_budget(client: DecodeClient, settings: Settings) -> None:
    jobs = [submit(client, number) for number in range(4)]
    with ThreadWorker(settings, mode="fast", max_batch_px=2 * 64 * 64) as running:
        wait_all(client, jobs)
    assert [shape[0] for shape in running.gate.calls] == [2, 2]


def test_one_latent_that_fails_takes_no_other_along_and_is_the_one_blamed(
    client: DecodeClient, settings: Settings
) -> None:
    jobs = [submit(client, number) for number in (1.0, POISONED, 2.0)]

    def break_on_poison(latents: torch.Tensor) -> None:
        if bool((latents > 100).any()):  # 77 / 0.18215
            raise RuntimeError("this latent breaks the VAE")

    with ThreadWorker(settings, mode="fast") as running:
        running.gate.on_call = break_on_poison
        wait_all(client, jobs)
    assert [job.status() for job in jobs] == [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.SUCCEEDED]
    errors = jobs[1].snapshot().errors
    assert [error["code"] for error in errors] == [DecodeFailed.code] * settings.max_errors
    assert "this latent breaks the VAE" in errors[0]["message"]
    assert jobs[0].snapshot().errors == ()


def test_an_encoder_that_gives_up_takes_no_other_job_of_its_batch_along(
    client: DecodeClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives up before the first pixel came, and the device finds nobody at the other end."""
    jobs = [submit(client, number) for number in (1.0, 2.0, 3.0, 4.0)]
    encode, accept = FinishStage._encode, FinishStage.accept

    def broken(self: FinishStage, work: Work, stream: ChunkStream) -> Any:
        if work.claim.job_id == jobs[0].id:
            raise EncodeFailed("could not start ffmpeg: no space left on device")
        return encode(self, work, stream)

    def and_wait_for_the_end(self: FinishStage, work: Work, stream: ChunkStream) -> None:
        accept(self, work, stream)
        if work.claim.job_id == jobs[0].id:
            assert stream._closed.wait(60)

    monkeypatch.setattr(FinishStage, "_encode", broken)
    monkeypatch.setattr(FinishStage, "accept", and_wait_for_the_end)
    with ThreadWorker(settings, mode="fast", encode_threads=1) as running:
        wait_all(client, jobs)
        assert running.gate.calls[0][0] == 4
    assert [job.status() for job in jobs] == [JobStatus.FAILED, *[JobStatus.SUCCEEDED] * 3]
    assert [error["code"] for error in jobs[0].snapshot().errors] == [EncodeFailed.code] * settings.max_errors
    assert [job.snapshot().attempts for job in jobs[1:]] == [1, 1, 1]
