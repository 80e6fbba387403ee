"""A job goes the whole way: producer process → broker → worker process → result."""

from __future__ import annotations

import torch

from producer import DecodeClient, JobStatus
from tests.support.processes import WorkerProcesses


def test_latents_submitted_here_are_decoded_by_a_worker_process(client: DecodeClient, workers: WorkerProcesses) -> None:
    workers.start("sd")
    job = client.submit(torch.randn(2, 4, 8, 16), vae="sd", metadata={"prompt": "a test"})
    assert job.wait(timeout=60).status is JobStatus.SUCCEEDED
    pictures = job.images()
    assert [picture.size for picture in pictures] == [(128, 64), (128, 64)]
    assert pictures[0].info["prompt"] == "a test"
