"""Families whose pipelines are modular: the reference is diffusers' own decode block, called with latents."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from producer.submission import DecodeOptions, build_request
from producer.tensor_input import to_tensor_file
from tests.parity.test_every_pipeline import COLUMNS, ROWS, decode
from tests.support.tiny_families import catalogue, make

pytestmark = pytest.mark.usefixtures("pipelines_importable")


def run_block(module: str, name: str, components: Any, **inputs: Any) -> Any:
    """What a decode block leaves in its state."""
    blocks = importlib.import_module(f"diffusers.modular_pipelines.{module}.decoders")
    state = importlib.import_module("diffusers.modular_pipelines.modular_pipeline").PipelineState()
    for key, value in inputs.items():
        state.set(key, value)
    _, state = getattr(blocks, name)()(components, state)
    return state


def ours(vae_name: str, vae: Any, latents: torch.Tensor, **options: Any) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    catalog, settings = VaeCatalog.load(), load_settings(_env_file=None)
    tensor = to_tensor_file(latents, max_bytes=settings.max_latents_bytes)
    request = build_request(tensor, DecodeOptions(vae=vae_name, **options), catalog=catalog, settings=settings)
    return decode(request, vae, latents)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def arrays(pictures: Any) -> npt.NDArray[np.uint8]:
    return np.stack(
        [
            np.stack([np.asarray(frame) for frame in item]) if isinstance(item, list) else np.asarray(item)
            for item in pictures
        ]
    )


@pytest.fixture
def vae_of() -> Callable[[str], Any]:
    return lambda name: make(name, catalogue()[name])


def test_anima(vae_of: Callable[[str], Any]) -> None:
    vae, latents = vae_of("qwen-image"), randn(2, 16, 1, ROWS, COLUMNS)
    state = run_block("anima", "AnimaVaeDecoderStep", SimpleNamespace(vae=vae), latents=latents)
    made, pixels = ours("qwen-image", vae, latents, layout="frame")
    assert torch.equal(made, state.get("images"))
    assert np.array_equal(pixels, arrays(VaeImageProcessor().postprocess(state.get("images"), "pil")))


def test_flux3(vae_of: Callable[[str], Any]) -> None:
    vae, latents = vae_of("flux2"), randn(2, 128, ROWS // 2, COLUMNS // 2)
    processor = importlib.import_module("diffusers.modular_pipelines.flux3.image_processor").Flux3ImageProcessor()
    components = SimpleNamespace(vae=vae, image_processor=processor)
    inputs = {"latents": latents, "output_type": "pil", "reference_crop": None}
    state = run_block("flux3", "Flux3DecodeStep", components, **inputs)
    _, pixels = ours("flux2", vae, latents, layout="patched")
    assert np.array_equal(pixels, arrays(state.get("images")))


@pytest.mark.parametrize("frames", [3, 5, 7])
def test_minimax_h3(frames: int, vae_of: Callable[[str], Any]) -> None:
    vae, latents = vae_of("minimax-h3"), randn(1, 24, frames, ROWS, COLUMNS)
    pipeline = importlib.import_module(
        "diffusers.modular_pipelines.minimax_h3.modular_pipeline"
    ).MiniMaxH3ModularPipeline
    components = SimpleNamespace(
        vae=vae,
        video_processor=VideoProcessor(vae_scale_factor=16, do_normalize=False),
        pixel_mean=pipeline.pixel_mean.fget(None),
        pixel_std=pipeline.pixel_std.fget(None),
        _execution_device=torch.device("cpu"),
    )
    given: list[torch.Tensor] = []
    postprocess = components.video_processor.postprocess_video

    def noting(video: torch.Tensor, **options: Any) -> Any:
        given.append(video)
        return postprocess(video, **options)

    components.video_processor.postprocess_video = noting
    state = run_block("minimax_h3", "MiniMaxH3VideoDecodeStep", components, latents=latents, output_type="pil")
    made, pixels = ours("minimax-h3", vae, latents)
    assert torch.equal(made, given[0])
    assert np.array_equal(pixels, arrays(state.get("videos")))


def test_sana_video_with_the_vae_of_ltx2(vae_of: Callable[[str], Any]) -> None:
    # pipeline_sana_video.py __call__ asks its VAE's class; the branch for Wan's is in test_every_pipeline.py.
    tails = importlib.import_module("tests.parity.pipeline_tails")
    vae, latents = vae_of("sana-video-ltx2"), randn(1, 128, 2, 2, 3)
    known = {"use_resolution_binning": False, "height": 64, "width": 96}
    expected, expected_pixels = tails.run_tail(tails.load("SanaVideoPipeline"), vae, latents, **known)
    made, pixels = ours("sana-video-ltx2", vae, latents)
    assert torch.equal(made, expected)
    assert np.array_equal(pixels, expected_pixels)


@pytest.mark.parametrize("name", ["taesd", "taesdxl"])
def test_a_preview_is_the_tiny_decoder_on_the_pipelines_own_latents(name: str, vae_of: Callable[[str], Any]) -> None:
    tails = importlib.import_module("tests.parity.pipeline_tails")
    vae, latents = vae_of(name), randn(2, 4, ROWS, COLUMNS)
    expected, expected_pixels = tails.run_tail(tails.load("StableDiffusionPipeline"), vae, latents)
    made, pixels = ours(name, vae, latents)
    assert torch.equal(made, expected)
    assert np.array_equal(pixels, expected_pixels)


@pytest.mark.parametrize(
    ("name", "pipeline", "shape", "size"),
    [
        ("sdxl-original", "StableDiffusionXLPipeline", (2, 4, ROWS, COLUMNS), {}),
        ("playground", "StableDiffusionXLPipeline", (2, 4, ROWS, COLUMNS), {}),
        ("prx-dc", "PRXPipeline", (1, 32, 3, 4), {"height": 90, "width": 120}),
    ],
)
def test_the_second_vae_of_a_pipeline(
    name: str, pipeline: str, shape: tuple[int, ...], size: dict[str, int], vae_of: Callable[[str], Any]
) -> None:
    tails = importlib.import_module("tests.parity.pipeline_tails")
    vae, latents = vae_of(name), randn(*shape)
    binning = {"orig_height": size.get("height"), "orig_width": size.get("width")}
    known = {"use_resolution_binning": bool(size), **binning}
    expected, expected_pixels = tails.run_tail(tails.load(pipeline), vae, latents, **known)
    made, pixels = ours(name, vae, latents, **size)
    assert torch.equal(made, expected)
    assert np.array_equal(pixels, expected_pixels)


def test_a_preview_of_flux(vae_of: Callable[[str], Any]) -> None:
    tails = importlib.import_module("tests.parity.pipeline_tails")
    vae, latents = vae_of("taef1"), randn(2, ROWS * COLUMNS // 4, 64)
    size = {"height": ROWS * 8, "width": COLUMNS * 8}
    expected, expected_pixels = tails.run_tail(tails.load("FluxPipeline"), vae, latents, **size)
    made, pixels = ours("taef1", vae, latents, **size)
    assert torch.equal(made, expected)
    assert np.array_equal(pixels, expected_pixels)
