"""Encode: latents as diffusers' own image-to-image pipelines make them of the same pictures, through the queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor
from PIL import Image

from broker_config.errors import (
    InvalidDtype,
    InvalidOption,
    InvalidRank,
    InvalidSize,
    JobFailed,
    LatentsNotFinite,
    UnknownLayout,
)
from broker_config.latent_geometry import LatentLayout
from tests.parity.test_remote_vae_families import _vae
from tests.parity.whole_pipelines import diffusers_class
from tests.support.serving import Serving, serving
from tests.support.tiny_families import write_family_catalog
from worker.encode import encode_pixels
from worker.latent_layouts import Plan, scaling_of

pytestmark = pytest.mark.usefixtures("pipelines_importable")

NAMES = ("sd", "sdxl", "sd3", "flux", "wan", "hunyuanvideo", "playground", "sana")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_catalog(tmp_path_factory.mktemp("encode"), NAMES)


@pytest.fixture(scope="module")
def served(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("encode-broker"), catalog=catalog, vaes=NAMES) as started:
        yield started


def pictures(batch: int = 2, height: int = 48, width: int = 64) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def images(array: npt.NDArray[np.uint8]) -> list[Image.Image]:
    return [Image.fromarray(item) for item in array]


def encoded(served: Serving, given: Any, **options: Any) -> torch.Tensor:
    return served.finished(served.client.encode(given, **options)).tensor()


def bare(pipeline: str, vae: Any) -> Any:
    """A pipeline's own encoding method, on no more than a VAE."""
    kind = diffusers_class(pipeline)
    return lambda image, generator: kind._encode_vae_image(SimpleNamespace(vae=vae), image, generator)


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("sd", "StableDiffusionInpaintPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("sd3", "StableDiffusion3InpaintPipeline"),
    ],
)
def test_a_sample_of_the_posterior_is_the_pipelines(name: str, pipeline: str, catalog: Path, served: Serving) -> None:
    vae, given = _vae(catalog.parent / name), images(pictures())
    with torch.no_grad():
        values = VaeImageProcessor(vae_scale_factor=8).preprocess(given)
        expected = bare(pipeline, vae)(values, torch.Generator().manual_seed(7))
    assert torch.equal(encoded(served, given, vae=name, seed=7), expected)


def test_flux_is_packed(catalog: Path, served: Serving) -> None:
    vae, array = _vae(catalog.parent / "flux"), pictures()
    kind = diffusers_class("FluxImg2ImgPipeline")
    with torch.no_grad():
        values = VaeImageProcessor(vae_scale_factor=16).preprocess(images(array))
        latents = bare("FluxImg2ImgPipeline", vae)(values, torch.Generator().manual_seed(7))
        expected = kind._pack_latents(latents, 2, 16, 6, 8)
    assert torch.equal(encoded(served, array, vae="flux", seed=7), expected)
    assert torch.equal(encoded(served, array, vae="flux", seed=7, layout="unpacked"), latents)


def test_statistics_of_sdxl_are_applied(catalog: Path, served: Serving) -> None:
    vae, array = _vae(catalog.parent / "playground"), pictures(batch=1)
    kind = diffusers_class("StableDiffusionXLImg2ImgPipeline")
    holder = SimpleNamespace(vae=vae, text_encoder_2=None, text_encoder=None)
    with torch.no_grad():
        values = VaeImageProcessor(vae_scale_factor=8).preprocess(images(array))
        expected = kind.prepare_latents(
            holder, values, None, 1, 1, torch.float32, "cpu", torch.Generator().manual_seed(7), add_noise=False
        )
    assert torch.equal(encoded(served, array, vae="playground", seed=7), expected)


def test_clips_of_wan_take_the_posteriors_mean(catalog: Path, served: Serving) -> None:
    vae = _vae(catalog.parent / "wan")
    clips = np.random.default_rng(3).integers(0, 256, (2, 5, 48, 64, 3), dtype=np.uint8)
    kind = diffusers_class("WanVideoToVideoPipeline")
    holder = SimpleNamespace(
        vae=vae,
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        # the scheduler mixes noise in afterwards: this one keeps what was encoded
        scheduler=SimpleNamespace(add_noise=lambda latents, noise, timestep: latents),
    )
    with torch.no_grad():
        videos = torch.cat([VideoProcessor(vae_scale_factor=8).preprocess_video(images(clip)) for clip in clips])
        expected = kind.prepare_latents(
            holder, videos, batch_size=2, height=48, width=64, dtype=torch.float32, device="cpu"
        )
    assert torch.equal(encoded(served, clips, vae="wan"), expected)
    assert torch.equal(encoded(served, clips[0], vae="wan"), expected[:1])


def test_a_picture_for_hunyuanvideo(catalog: Path, served: Serving) -> None:
    vae, array = _vae(catalog.parent / "hunyuanvideo"), pictures(batch=1)
    kind = diffusers_class("HunyuanVideoImageToVideoPipeline")
    holder = SimpleNamespace(
        vae=vae, vae_scale_factor_temporal=4, vae_scale_factor_spatial=8, vae_scaling_factor=vae.config.scaling_factor
    )
    with torch.no_grad():
        values = VideoProcessor(vae_scale_factor=8).preprocess(images(array))
        _, expected = kind.prepare_latents(
            holder,
            values,
            batch_size=1,
            num_channels_latents=16,
            height=48,
            width=64,
            num_frames=1,
            dtype=torch.float32,
            device="cpu",
            image_condition_type="token_replace",
        )
    assert torch.equal(encoded(served, array, vae="hunyuanvideo"), expected)


def test_what_was_encoded_can_be_decoded_and_the_result_says_what_did_it(served: Serving) -> None:
    job = served.finished(served.client.encode(pictures(), vae="sd", metadata={"for": "img2img"}))
    snapshot = job.snapshot()
    assert snapshot.request is not None
    assert (snapshot.request.kind, snapshot.request.schema_version) == ("encode", 2)
    assert job.result().decoded_by["weights"]["class"] == "AutoencoderKL"
    made = served.decode(job.tensor(), vae="sd", output="uint8").array()
    assert made.shape == (2, 48, 64, 3)
    with pytest.raises(InvalidOption, match="nothing to decode again"):
        job.redecode(output="png")


def values(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "wan", "hunyuanvideo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_floats_reach_the_vae_as_they_are(name: str, dtype: torch.dtype, catalog: Path, served: Serving) -> None:
    vae, clip = _vae(catalog.parent / name), name in ("wan", "hunyuanvideo")
    given = (values(2, 3, 5, 48, 64) if clip else values(2, 3, 48, 64)).to(dtype)
    with torch.no_grad():
        expected = vae.encode(given.float()).latent_dist.mode()
    layout = {} if clip else {"layout": "unpacked"}
    assert torch.equal(encoded(served, given, vae=name, state="denormalised", **layout), expected)
    if dtype is not torch.bfloat16:
        assert torch.equal(encoded(served, given.numpy(), vae=name, state="denormalised", **layout), expected)


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(1, 48, 64, 3), torch.zeros((1, 3, 48, 64), dtype=torch.uint8), torch.zeros(2, 3, 48, 64)],
    ids=["floats with channels last", "bytes with channels first", "another batch"],
)
def test_a_worker_refuses_pixels_that_are_not_the_jobs(pixels: torch.Tensor, catalog: Path) -> None:
    vae = _vae(catalog.parent / "sd")
    plan = Plan(
        layout=LatentLayout.UNPACKED,
        scaling=scaling_of(vae, scaling_factor=None, shift_factor=None),
        batch=1,
        num_frames=1,
        height=48,
        width=64,
        spatial=8,
        is_video=False,
    )
    with pytest.raises(InvalidSize, match="the job says"):
        encode_pixels(vae, pixels, plan, seed=None)


def test_strides_of_floats_do_not_matter(catalog: Path, served: Serving) -> None:
    vae, given = _vae(catalog.parent / "sd"), values(1, 48, 64, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = vae.encode(given.contiguous()).latent_dist.mode() * vae.config.scaling_factor
    assert torch.equal(encoded(served, given, vae="sd"), expected)


def test_a_shift_contradicts_statistics(served: Serving) -> None:
    with pytest.raises(JobFailed, match=r"shift_factor is 0\.1.*leave it out"):
        encoded(served, values(1, 3, 48, 64), vae="playground", scaling_factor=0.5, shift_factor=0.1)


def test_dc_ae_has_no_posterior(catalog: Path, served: Serving) -> None:
    vae, array = _vae(catalog.parent / "sana"), pictures(batch=1, height=64, width=96)
    with torch.no_grad():
        values = VaeImageProcessor(vae_scale_factor=32).preprocess(images(array))
        # pipeline_sana_sprint_img2img.py prepare_latents
        expected = vae.encode(values).latent * vae.config.scaling_factor
    assert torch.equal(encoded(served, array, vae="sana"), expected)


@pytest.mark.parametrize(
    ("given", "options", "kind", "field", "words"),
    [
        (np.zeros((1, 3, 48, 64), np.float64), {"vae": "sd"}, InvalidDtype, "pictures", "float64.*uint8"),
        (torch.zeros((1, 3, 48, 64), dtype=torch.uint8), {"vae": "sd"}, InvalidDtype, "pictures", "uint8 in numpy"),
        (np.zeros((1, 48, 64, 3), np.float32), {"vae": "sd"}, InvalidRank, "pictures", "floats have them first"),
        (torch.zeros(1, 3, 48, 64), {"vae": "wan"}, InvalidRank, "pictures", r"batch, 3, frames, height"),
        (torch.zeros(1, 3, 48, 60), {"vae": "sd"}, InvalidSize, "width", "60.*multiples of 8"),
        (torch.full((1, 3, 48, 64), torch.nan), {"vae": "sd"}, LatentsNotFinite, "pictures", "9216 of 9216"),
        (np.zeros((1, 48, 64, 4), np.uint8), {"vae": "sd"}, InvalidRank, "pictures", r"\[1, 48, 64, 4\]"),
        (np.zeros((48, 64), np.uint8), {"vae": "sd"}, InvalidRank, "pictures", r"\[48, 64\]"),
        (np.zeros((1, 50, 64, 3), np.uint8), {"vae": "sd"}, InvalidSize, "height", "50.*multiples of 8"),
        (np.zeros((1, 48, 72, 3), np.uint8), {"vae": "flux"}, InvalidSize, "width", "72.*multiples of 16"),
        (np.zeros((4, 48, 64, 3), np.uint8), {"vae": "wan"}, InvalidSize, "num_frames", "4 frames"),
        (np.zeros((1, 48, 64, 3), np.uint8), {"vae": "svd"}, UnknownLayout, "layout", "svd"),
        (np.zeros((1, 64, 64, 3), np.uint8), {"vae": "flux2-klein"}, InvalidOption, "state", "denormalised"),
        (np.zeros((1, 48, 64, 3), np.uint8), {"vae": "sd", "output": "png"}, InvalidOption, "output", "encode"),
        ("cat.png", {"vae": "sd"}, InvalidOption, "pictures", "neither PIL"),
        ([], {"vae": "sd"}, InvalidOption, "pictures", "neither PIL"),
    ],
)
def test_pictures_that_cannot_be_encoded_are_refused_at_the_door(
    given: Any, options: dict[str, Any], kind: Any, field: str, words: str, served: Serving
) -> None:
    before = served.admin.dbsize()
    with pytest.raises(kind, match=words) as refusal:
        served.client.encode(given, **options)
    assert refusal.value.field == field
    assert served.admin.dbsize() == before


def test_pictures_of_two_sizes_are_refused(served: Serving) -> None:
    with pytest.raises(InvalidSize, match="each size by itself"):
        served.client.encode([Image.new("RGB", (64, 48)), Image.new("RGB", (48, 64))], vae="sd")
