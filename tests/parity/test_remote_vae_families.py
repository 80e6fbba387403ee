"""The picture is the pipeline's picture: the families of the remote-VAE service, bit for bit, through the queue.

Given a whole diffusers pipeline with a tiny denoiser and the VAE weights that the worker has; when it is called
once for latents and once more, with the same seed, for pictures; then the latents of the first call, sent through
the queue to a worker process, come back as what the second call decoded. Nothing of the reference is ours.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from imageio_ffmpeg import count_frames_and_secs

from producer import JobHandle
from tests.support.serving import Serving
from worker.video_encoding import encode_video

pytestmark = pytest.mark.usefixtures("pipelines_importable")

#: Width of prompt embeddings, pooled or not, that the tiny denoisers take.
TEXT = 8


def _diffusers(name: str) -> Any:
    """A class of diffusers; looked up late, since its pipelines take seconds to import."""
    return getattr(importlib.import_module("diffusers"), name)


def _vae(folder: Path) -> Any:
    vae_class = json.loads((folder / "config.json").read_text())["_class_name"]
    return _diffusers(vae_class).from_pretrained(folder, low_cpu_mem_usage=False)


def _unet(**config: Any) -> Any:
    return _diffusers("UNet2DConditionModel")(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=2,
        norm_num_groups=2,
        **config,
    )


def _ddim() -> Any:
    return _diffusers("DDIMScheduler")(beta_schedule="linear", steps_offset=1, clip_sample=False)


def _flow_match() -> Any:
    return _diffusers("FlowMatchEulerDiscreteScheduler")()


def _stable_diffusion(vae: Any) -> Any:
    return _diffusers("StableDiffusionPipeline")(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=_unet(),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _animate_diff(vae: Any) -> Any:
    return _diffusers("AnimateDiffPipeline")(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=_unet(),
        motion_adapter=_diffusers("MotionAdapter")(
            block_out_channels=(4, 8),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
        ),
        scheduler=_ddim(),
    )


def _stable_diffusion_xl(vae: Any) -> Any:
    return _diffusers("StableDiffusionXLPipeline")(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        unet=_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT,
        ),
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _flux(vae: Any) -> Any:
    return _diffusers("FluxPipeline")(
        scheduler=_flow_match(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=_diffusers("FluxTransformer2DModel")(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=1,
            joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def _hunyuan_video(vae: Any) -> Any:
    return _diffusers("HunyuanVideoPipeline")(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=_diffusers("HunyuanVideoTransformer3DModel")(
            in_channels=16,
            out_channels=16,
            num_attention_heads=1,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=TEXT,
            pooled_projection_dim=TEXT,
            rope_axes_dim=(4, 4, 8),
        ),
        vae=vae,
        scheduler=_flow_match(),
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of a pipeline, and what a producer says of its latents."""

    vae: str
    build: Callable[[Any], Any]
    batch: int
    height: int
    width: int
    #: Frames of each clip; None: pictures.
    num_frames: int | None = None
    #: More arguments of the pipeline.
    call: dict[str, Any] = field(default_factory=dict)
    #: Options of the job beside `vae` and `output`.
    options: dict[str, Any] = field(default_factory=dict)
    #: What a producer may have done to the latents between the pipeline and the queue.
    reshape: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
    #: Settings of the VAE's config that the job overrides.
    vae_config: dict[str, Any] = field(default_factory=dict)
    #: What makes the tensor before postprocessing: an attribute of the pipeline, dotted.
    decoder: str = "vae.decode"

    @property
    def is_clip(self) -> bool:
        return self.num_frames is not None


def _flux_unpacked(latents: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    unpacked: torch.Tensor = _diffusers("FluxPipeline")._unpack_latents(latents, height, width, 8)
    return unpacked


_NO_GUIDANCE = {"guidance_scale": 1.0}

CASES = {
    "sd": Case(vae="sd", build=_stable_diffusion, batch=1, height=64, width=64, call=_NO_GUIDANCE),
    "sd, batch of 2, landscape": Case(
        vae="sd", build=_stable_diffusion, batch=2, height=64, width=96, call=_NO_GUIDANCE
    ),
    "sd, factor of another VAE": Case(
        vae="sd",
        build=_stable_diffusion,
        batch=1,
        height=64,
        width=64,
        call=_NO_GUIDANCE,
        options={"scaling_factor": 0.25},
        vae_config={"scaling_factor": 0.25},
    ),
    "sd, clips of AnimateDiff": Case(  # 18 frames: more than the 16 that are decoded at a time
        vae="sd",
        build=_animate_diff,
        batch=2,
        height=32,
        width=48,
        num_frames=9,
        call=_NO_GUIDANCE,
        decoder="decode_latents",
    ),
    "sdxl": Case(vae="sdxl", build=_stable_diffusion_xl, batch=1, height=64, width=64, call=_NO_GUIDANCE),
    "sdxl, batch of 2, portrait": Case(
        vae="sdxl", build=_stable_diffusion_xl, batch=2, height=96, width=64, call=_NO_GUIDANCE
    ),
    "sdxl, per-channel statistics": Case(
        vae="sdxl-statistics", build=_stable_diffusion_xl, batch=2, height=64, width=96, call=_NO_GUIDANCE
    ),
    "flux, packed": Case(vae="flux", build=_flux, batch=1, height=64, width=64, options={"height": 64, "width": 64}),
    "flux, packed, batch of 2, landscape": Case(
        vae="flux", build=_flux, batch=2, height=48, width=96, options={"height": 48, "width": 96}
    ),
    "flux, packed, a size the pipeline rounds down": Case(  # to 64 × 96: multiples of 16
        vae="flux", build=_flux, batch=1, height=72, width=104, options={"height": 72, "width": 104}
    ),
    "flux, unpacked, portrait": Case(
        vae="flux",
        build=_flux,
        batch=2,
        height=96,
        width=32,
        reshape=functools.partial(_flux_unpacked, height=96, width=32),
    ),
    "hunyuanvideo, 3 latent frames": Case(
        vae="hunyuanvideo", build=_hunyuan_video, batch=1, height=32, width=32, num_frames=9
    ),
    "hunyuanvideo, 6 latent frames, batch of 2": Case(  # beyond 4 latent frames the VAE tiles over time
        vae="hunyuanvideo", build=_hunyuan_video, batch=2, height=32, width=48, num_frames=21
    ),
}
CLIPS = [name for name, case in CASES.items() if case.is_clip]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a pipeline made."""

    #: `output_type="latent"`.
    latents: torch.Tensor
    #: What its VAE returned: (B, 3, H, W) or (B, 3, F, H, W).
    decoded: torch.Tensor
    #: `output_type="pil"`, as arrays: (B, H, W, 3) or (B, F, H, W, 3).
    pixels: npt.NDArray[np.uint8]


def _reference(case: Case, catalog: Path) -> Reference:
    vae = _vae(catalog.parent / case.vae)
    vae.register_to_config(**case.vae_config)
    torch.manual_seed(7)  # the denoiser's weights
    pipeline = case.build(vae)
    pipeline.set_progress_bar_config(disable=True)
    text = torch.Generator().manual_seed(11)
    arguments: dict[str, Any] = {"prompt_embeds": torch.randn(case.batch, 3, TEXT, generator=text)}
    if case.build not in (_stable_diffusion, _animate_diff):
        arguments["pooled_prompt_embeds"] = torch.randn(case.batch, TEXT, generator=text)
    if case.build is _hunyuan_video:
        arguments["prompt_attention_mask"] = torch.ones(case.batch, 3)
    if case.num_frames is not None:
        arguments["num_frames"] = case.num_frames

    def call(output_type: str) -> Any:
        made = pipeline(
            height=case.height,
            width=case.width,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(13),
            output_type=output_type,
            return_dict=False,
            **arguments,
            **case.call,
        )
        return made[0]

    latents = call("latent")
    caught = _catch_return(pipeline, case.decoder)
    pictures = call("pil")
    (decoded,) = caught
    return Reference(latents=latents, decoded=decoded, pixels=np.stack([_pixels(item) for item in pictures]))


def _pixels(made: Any) -> npt.NDArray[np.uint8]:
    """Of one picture, or of the list of pictures that is a clip."""
    return np.stack([np.asarray(frame) for frame in made]) if isinstance(made, list) else np.asarray(made)


def _catch_return(pipeline: Any, dotted: str) -> list[torch.Tensor]:
    """Makes `pipeline.dotted` note what it returns; returns the notes."""
    *path, name = dotted.split(".")
    owner = functools.reduce(getattr, path, pipeline)
    original, caught = getattr(owner, name), []

    def noting(*args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        caught.append((made[0] if isinstance(made, tuple) else made).clone())
        return made

    setattr(owner, name, noting)
    return caught


@pytest.fixture(scope="module")
def references(parity_catalog: Path, pipelines_importable: None) -> Iterator[Callable[[str], Reference]]:
    """The reference of a case, made once."""
    made = functools.cache(lambda name: _reference(CASES[name], parity_catalog))
    yield made
    made.cache_clear()


def _submitted(served: Serving, name: str, reference: Reference, output: str, **options: Any) -> JobHandle:
    case = CASES[name]
    options |= case.options
    return served.decode(case.reshape(reference.latents), vae=case.vae, output=output, **options)


@pytest.mark.parametrize("name", CASES)
def test_the_pipelines_pictures_are_worth_comparing(name: str, references: Callable[[str], Reference]) -> None:
    made = references(name)
    assert made.decoded.dtype == torch.float32
    assert made.decoded.shape[0] == CASES[name].batch
    shades = [len(np.unique(item)) for item in made.pixels]
    assert min(shades) > 64, "a flat or black picture is equal to any other"
    assert len({item.tobytes() for item in made.pixels}) == CASES[name].batch, "so is a batch of one picture"


@pytest.mark.parametrize("name", CASES)
def test_the_tensor_is_what_the_pipelines_vae_returned_bit_for_bit(
    name: str, references: Callable[[str], Reference], parity: Serving
) -> None:
    expected = references(name)
    job = _submitted(parity, name, expected, "tensor")
    result = job.tensor()
    assert result.dtype == torch.float32
    assert result.shape == expected.decoded.shape
    assert torch.equal(result, expected.decoded)
    assert job.result().decoded_by["dtype"] == "float32"


@pytest.mark.parametrize("name", CASES)
def test_uint8_is_the_pixels_of_the_pipelines_pil_pictures(
    name: str, references: Callable[[str], Reference], parity: Serving
) -> None:
    expected = references(name)
    pixels = _submitted(parity, name, expected, "uint8").array()
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.pixels.shape
    assert np.array_equal(pixels, expected.pixels)


@pytest.mark.parametrize("name", [name for name in CASES if name not in CLIPS])
def test_png_holds_the_pixels_of_the_pipelines_pil_pictures(
    name: str, references: Callable[[str], Reference], parity: Serving
) -> None:
    expected = references(name)
    pictures = _submitted(parity, name, expected, "png").images()
    assert [picture.mode for picture in pictures] == ["RGB"] * CASES[name].batch
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected.pixels)


@pytest.mark.parametrize("name", CLIPS)
def test_mp4_holds_the_frames_of_the_pipelines_video_processor_each_clip_in_its_own_file(
    name: str, references: Callable[[str], Reference], parity: Serving, tmp_path: Path
) -> None:
    expected, case = references(name), CASES[name]
    clips = _submitted(parity, name, expected, "mp4", fps=12, provenance=False).videos()
    assert len(clips) == case.batch
    for clip, frames in zip(clips, expected.pixels, strict=True):
        path = tmp_path / "clip.mp4"
        path.write_bytes(clip)
        assert count_frames_and_secs(path) == (case.num_frames, pytest.approx(len(frames) / 12, abs=0.01))
        # H.264 is not lossless, but equal frames give equal bytes (tests/encoding holds the encoder to that).
        assert clip == encode_video(frames, fps=12, metadata={}, provenance=None).data
