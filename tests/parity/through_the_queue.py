"""What comes back from a worker, held against what a pipeline made."""

from __future__ import annotations

import numpy as np
import torch

from tests.parity.families import Reference
from tests.parity.whole_pipelines import Whole
from tests.support.serving import Serving


def assert_a_worker_makes_the_same(served: Serving, case: Whole, expected: Reference) -> None:
    """Submits the latents with their pipeline, once for the tensor and once for pixels."""
    assert len(expected.latents) == case.batch
    assert len(np.unique(expected.pixels)) > 16, "a flat picture is equal to any other"
    given = {"pipeline": expected.pipeline, **case.given}
    job = served.decode(expected.latents, output="tensor", **given)
    made = job.tensor()
    assert made.dtype == expected.decoded.dtype == torch.float32
    # pipelines differ in whether one picture is a clip of one frame, and one clip a list of itself
    decoded = expected.decoded.reshape(made.shape)
    assert torch.allclose(made, decoded, atol=1e-5) if case.rounds else torch.equal(made, decoded)
    assert job.snapshot().vae == case.vae
    job.ack()
    if expected.pixels.dtype != np.uint8:
        return  # no pixels hold it
    pixels_job = served.decode(expected.latents, output="uint8", **given)
    pixels = pixels_job.array()
    assert np.abs(pixels.astype(int) - expected.pixels.reshape(pixels.shape)).max() <= int(case.rounds)
    pixels_job.ack()
