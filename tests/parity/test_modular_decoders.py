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
from producer.decode_options import DecodeOptions
from producer.submission import build_request
from producer.tensor_input import to_tensor_file
from tests.parity.our_way import decode
from tests.parity.tail_cases import COLUMNS, ROWS

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


def test_anima(vaes: Callable[[str], Any]) -> None:
    vae, latents = vaes("qwen-image"), randn(2, 16, 1, ROWS, COLUMNS)
    state = run_block("anima", "AnimaVaeDecoderStep", SimpleNamespace(vae=vae), latents=latents)
    made, pixels = ours("qwen-image", vae, latents, layout="frame")
    assert torch.equal(made, state.get("images"))
    assert np.array_equal(pixels, arrays(VaeImageProcessor().postprocess(state.get("images"), "pil")))


def test_flux3(vaes: Callable[[str], Any]) -> None:
    vae, latents = vaes("flux2"), randn(2, 128, ROWS // 2, COLUMNS // 2)
    processor = importlib.import_module("diffusers.modular_pipelines.flux3.image_processor").Flux3ImageProcessor()
    components = SimpleNamespace(vae=vae, image_processor=processor)
    inputs = {"latents": latents, "output_type": "pil", "reference_crop": None}
    state = run_block("flux3", "Flux3DecodeStep", components, **inputs)
    _, pixels = ours("flux2", vae, latents, layout="patched")
    assert np.array_equal(pixels, arrays(state.get("images")))


@pytest.mark.parametrize("frames", [3, 5, 7])
def test_minimax_h3(frames: int, vaes: Callable[[str], Any]) -> None:
    vae, latents = vaes("minimax-h3"), randn(1, 24, frames, ROWS, COLUMNS)
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
