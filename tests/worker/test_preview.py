"""Previews: a small VAE shows the picture before the decode, and nothing that happens to it hurts the job."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from broker_config.connection import connect_url
from broker_config.errors import InvalidOption
from broker_config.settings import Settings
from producer import AsyncDecodeClient, DecodeClient, JobStatus
from tests.support.thread_worker import ThreadWorker
from tests.support.tiny_families import make, write_family_catalog
from worker.image_encoding import encode_image

NAMES = ("sd", "taesd", "flux", "taef1", "sd3")


@pytest.fixture(scope="session")
def tiny_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_catalog(tmp_path_factory.mktemp("previews"), NAMES)


@pytest.fixture
def worker(settings: Settings) -> Iterator[ThreadWorker]:
    with ThreadWorker(settings, vaes=("sd", "taesd", "flux", "taef1")) as started:
        yield started


def latents_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def expected(name: str, latents: torch.Tensor) -> np.ndarray[Any, Any]:
    """The pixels that diffusers' small VAE makes, with the pipelines' postprocessing."""
    from diffusers.image_processor import VaeImageProcessor

    from tests.support.tiny_families import catalogue

    with torch.no_grad():
        sample = make(name, catalogue()[name]).decode(latents).sample
    return np.asarray(VaeImageProcessor().postprocess(sample, output_type="pil")[0])


def same(picture: Image.Image, wanted: np.ndarray[Any, Any]) -> bool:
    """Equal once both went through JPEG."""
    data = encode_image(wanted, output="jpg", metadata={}, provenance=None).data
    return np.array_equal(np.asarray(picture), np.asarray(Image.open(io.BytesIO(data))))


def assert_set(event: threading.Event) -> None:
    assert event.wait(60), "nobody lets the decode go on"


def test_the_preview_is_there_while_the_decode_is_held(client: DecodeClient, worker: ThreadWorker) -> None:
    latents = latents_of(2, 4, 8, 12)
    held = threading.Event()
    worker.gate.on_call = lambda _: None if len(worker.gate.calls) == 1 else assert_set(held)  # the preview comes first
    job = client.submit(latents, vae="sd", preview=True, output="tensor")
    picture = job.preview(timeout=60)
    assert picture is not None
    assert picture.format == "JPEG"
    assert not job.status().is_terminal
    assert same(picture, expected("taesd", latents[:1]))
    held.set()
    assert job.wait(60).status is JobStatus.SUCCEEDED
    assert job.result().decoded_by["preview"] == "shown by taesd"
    assert job.tensor().shape == (2, 3, 64, 96)


def test_packed_latents_and_the_first_frame_of_a_clip(client: DecodeClient, worker: ThreadWorker) -> None:
    from diffusers import FluxPipeline

    unpacked = latents_of(1, 16, 8, 12)
    packed = FluxPipeline._pack_latents(unpacked, 1, 16, 8, 12)
    picture = client.submit(packed, vae="flux", height=64, width=96, preview=True).preview(timeout=60)
    assert picture is not None
    assert same(picture, expected("taef1", unpacked))
    clip = latents_of(1, 4, 3, 8, 8)
    job = client.submit(clip, vae="sd", layout="video_2d", preview=True, output="png")
    picture = job.preview(timeout=60)
    assert picture is not None
    assert same(picture, expected("taesd", clip[:, :, 0]))
    assert job.wait(60).status is JobStatus.SUCCEEDED


def test_the_job_itself_is_decoded_as_without_a_preview(client: DecodeClient, worker: ThreadWorker) -> None:
    latents = latents_of(1, 4, 8, 8)
    jobs = [client.submit(latents, vae="sd", output="tensor", preview=preview) for preview in (True, False)]
    for job in jobs:
        job.wait(60)
    assert torch.equal(jobs[0].tensor(), jobs[1].tensor())
    assert jobs[1].preview(timeout=None) is None
    assert "preview" not in jobs[1].result().decoded_by
    again = jobs[0].redecode(output="tensor")
    again.wait(60)
    assert again.preview() is None, "a preview is not taken over"


def test_a_worker_without_the_small_vae_says_so_and_decodes(client: DecodeClient, settings: Settings) -> None:
    with ThreadWorker(settings, vaes=("sd",)):
        job = client.submit(latents_of(1, 4, 8, 8), vae="sd", preview=True)
        assert job.preview(timeout=None) is None
        assert job.status() is JobStatus.SUCCEEDED
        assert job.result().decoded_by["preview"] == "skipped: this worker does not serve taesd"


@pytest.mark.parametrize("error", [RuntimeError("the small VAE broke"), MemoryError("none left")])
def test_a_preview_that_fails_does_not_fail_the_job(
    error: Exception, client: DecodeClient, worker: ThreadWorker
) -> None:
    def fail(given: torch.Tensor) -> None:
        if len(worker.gate.calls) == 1:  # the preview comes first
            raise error

    worker.gate.on_call = fail
    job = client.submit(latents_of(1, 4, 8, 8), vae="sd", preview=True)
    assert job.wait(60).status is JobStatus.SUCCEEDED
    assert job.snapshot().attempts == 1
    assert job.preview() is None
    assert str(job.result().decoded_by["preview"]).startswith("failed: ")


def test_what_has_no_preview_is_refused_at_the_door(client: DecodeClient) -> None:
    with pytest.raises(InvalidOption, match=r"sd3 has no small VAE; .*flux.*sd"):
        client.submit(latents_of(1, 16, 8, 8), vae="sd3", preview=True)
    with pytest.raises(InvalidOption, match="denormalised"):
        client.submit(latents_of(1, 4, 8, 8), vae="sd", state="denormalised", preview=True)
    with pytest.raises(InvalidOption, match="expected True or False"):
        client.submit(latents_of(1, 4, 8, 8), vae="sd", preview="yes")
    with pytest.raises(InvalidOption, match="preview"):
        client.encode(np.zeros((64, 64, 3), np.uint8), vae="sd", preview=True)


def test_in_asyncio_too(settings: Settings, worker: ThreadWorker) -> None:
    async def story() -> Image.Image | None:
        assert settings.redis_url is not None
        connections = connect_url(settings.redis_url.get_secret_value(), name="latentq-test")
        async with AsyncDecodeClient(connections, settings=settings) as client:
            job = await client.submit(latents_of(1, 4, 8, 8), vae="sd", preview=True)
            picture = await job.preview(timeout=60)
            await job.wait(60)
            return picture

    picture = asyncio.run(story())
    assert picture is not None
    assert same(picture, expected("taesd", latents_of(1, 4, 8, 8)))
