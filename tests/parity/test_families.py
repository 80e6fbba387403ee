"""Whole pipelines of each group of layouts, through the queue: a worker sends back what they would have returned.

Given a diffusers pipeline with a tiny VAE; when it is called once for latents and once more, with the same seed, for
pictures; and the latents are submitted with `pipeline=`; then tensor and pixels that come back are the second call's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from broker_config.vae_catalog import VaeCatalog
from tests.parity.test_remote_vae_families import _pixels, _vae
from tests.parity.whole_pipelines import COLUMNS, ROWS, Whole, build, call, diffusers_class, mask, text
from tests.support.serving import Serving, serving
from tests.support.tiny_families import write_family_catalog

pytestmark = pytest.mark.usefixtures("pipelines_importable")

_SMALL = {"height": ROWS * 8, "width": COLUMNS * 8}
_LARGE = {"height": ROWS * 16, "width": COLUMNS * 16}
_HUGE = {"height": ROWS * 32, "width": COLUMNS * 32}
_UNGUIDED = {"guidance_scale": 1.0}


def _timestep_conditioning(vae: Any) -> None:
    vae.register_to_config(timestep_conditioning=True)


def _tiled(vae: Any) -> None:
    vae.enable_tiling()


def _euler(**config: Any) -> Callable[[], Any]:
    return lambda: diffusers_class("FlowMatchEulerDiscreteScheduler")(**config)


def _dpm() -> Any:
    return diffusers_class("DPMSolverMultistepScheduler")()


def _ddim(name: str = "DDIMScheduler") -> Callable[[], Any]:
    return lambda: diffusers_class(name)()


class _NoProcessor:
    """Qwen-Image 2.1 counts the tokens of its template as it is made."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0, 1]]


def _no_guidance() -> Any:
    guiders = importlib.import_module("diffusers.guiders")
    return guiders.ClassifierFreeGuidance(guidance_scale=1.0)


#: Prompt embeddings as most pipelines take them.
_PROMPT = {"prompt_embeds": text}
_MASKED = {"prompt_embeds": text, "prompt_attention_mask": mask}

CASES = {
    "wan": Whole(
        pipeline="WanPipeline",
        vae="wan",
        denoiser={"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2)},
        call={**_SMALL, **_PROMPT, **_UNGUIDED, "num_frames": 9},
    ),
    "wan22-5b": Whole(
        pipeline="WanPipeline",
        vae="wan22-5b",
        denoiser={"in_channels": 48, "out_channels": 48, "patch_size": (1, 2, 2)},
        call={**_LARGE, **_PROMPT, **_UNGUIDED, "num_frames": 5},
    ),
    "motif-video": Whole(
        pipeline="MotifVideoPipeline",
        vae="motif-video",
        denoiser={"in_channels": 33, "out_channels": 16, "patch_size": 2, "patch_size_t": 1},
        parts={"guider": _no_guidance},
        call={**_SMALL, **_MASKED, "num_frames": 5},
    ),
    "helios": Whole(
        pipeline="HeliosPipeline",
        vae="helios",
        denoiser={"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2)},
        call={**_SMALL, **_PROMPT, **_UNGUIDED, "num_frames": 17, "num_latent_frames_per_chunk": 3},
        given={"frames_per_call": 3},
    ),
    "qwen-image": Whole(
        pipeline="QwenImagePipeline",
        vae="qwen-image",
        denoiser={"in_channels": 64, "guidance_embeds": False},
        call={**_SMALL, "prompt_embeds": text, "prompt_embeds_mask": mask, "true_cfg_scale": 1.0},
        given=_SMALL,
    ),
    "qwen-image-21, RGBA": Whole(
        pipeline="QwenImage21Pipeline",
        vae="qwen-image-21",
        denoiser={"in_channels": 64, "guidance_embeds": False, "causal_condition": False},
        parts={"processor": _NoProcessor},
        call={**_LARGE, "prompt_embeds": text, "prompt_embeds_mask": lambda: mask().bool(), "true_cfg_scale": 1.0},
        given=_LARGE,
    ),
    "krea2": Whole(
        pipeline="Krea2Pipeline",
        vae="krea2",
        denoiser={"in_channels": 64},
        call={
            **_SMALL,
            "prompt_embeds": lambda: text()[:, :, None],
            "prompt_embeds_mask": lambda: mask().bool(),
            "guidance_scale": 0.0,
        },
        given=_SMALL,
    ),
    "flux2": Whole(
        pipeline="Flux2Pipeline",
        vae="flux2",
        denoiser={"in_channels": 128},
        call={**_SMALL, **_PROMPT},
        given=_SMALL,
    ),
    "flux2-klein": Whole(
        pipeline="Flux2KleinPipeline",
        vae="flux2-klein",
        denoiser={"in_channels": 128},
        parts={"is_distilled": True},
        call={**_SMALL, **_PROMPT},
    ),
    "ltx": Whole(
        pipeline="LTXPipeline",
        vae="ltx",
        denoiser={"in_channels": 128, "patch_size": 1, "patch_size_t": 1},
        call={**_HUGE, **_MASKED, **_UNGUIDED, "num_frames": 9},
        given={**_HUGE, "num_frames": 9},
    ),
    "cogvideox": Whole(
        pipeline="CogVideoXPipeline",
        vae="cogvideox-2b",
        denoiser={
            "in_channels": 16,
            "patch_size": 2,
            "patch_size_t": None,
            "sample_height": ROWS,
            "sample_width": COLUMNS,
            "sample_frames": 9,
            "max_text_seq_length": 3,
            "use_rotary_positional_embeddings": False,
        },
        scheduler=_ddim("CogVideoXDDIMScheduler"),
        call={**_SMALL, **_PROMPT, **_UNGUIDED, "num_frames": 9},
    ),
    "mochi": Whole(
        pipeline="MochiPipeline",
        vae="mochi",
        denoiser={"in_channels": 12},
        parts={"force_zeros_for_empty_prompt": False},
        call={**_SMALL, **_MASKED, **_UNGUIDED, "num_frames": 7},
    ),
    "sana, a size that is no bin": Whole(
        pipeline="SanaPipeline",
        vae="sana",
        denoiser={"in_channels": 32, "out_channels": 32, "sample_size": 16, "timestep_scale": 1.0},
        scheduler=_dpm,
        # 500 × 600 is decoded as 480 × 544, then resized and cropped
        call={**_MASKED, **_UNGUIDED, "height": 500, "width": 600},
        given={"height": 500, "width": 600},
    ),
    "sd3": Whole(
        pipeline="StableDiffusion3Pipeline",
        vae="sd3",
        denoiser={"in_channels": 16, "sample_size": 8, "patch_size": 2, "joint_attention_dim": 8},
        call={
            **_SMALL,
            **_PROMPT,
            "pooled_prompt_embeds": lambda: text()[:, 0],
            "guidance_scale": 0.0,
        },
    ),
    "cogview4": Whole(
        pipeline="CogView4Pipeline",
        vae="cogview4",
        denoiser={"in_channels": 16, "patch_size": 2, "sample_size": 8},
        call={**_SMALL, **_PROMPT, **_UNGUIDED},
    ),
    "auraflow": Whole(
        pipeline="AuraFlowPipeline",
        vae="auraflow",
        denoiser={"in_channels": 4, "sample_size": 8},
        call={**_SMALL, **_MASKED, **_UNGUIDED},
    ),
    "ernie-image": Whole(
        pipeline="ErnieImagePipeline",
        vae="ernie-image",
        denoiser={"in_channels": 128, "text_in_dim": 8},
        call={**_SMALL, "prompt_embeds": lambda: list(text()), **_UNGUIDED},
    ),
    "pixart-sigma": Whole(
        pipeline="PixArtSigmaPipeline",
        vae="pixart-sigma",
        denoiser={"in_channels": 4, "out_channels": 4, "sample_size": 8},
        scheduler=_dpm,
        call={**_SMALL, **_MASKED, **_UNGUIDED, "use_resolution_binning": False},
    ),
    "latte": Whole(
        pipeline="LattePipeline",
        vae="latte",
        denoiser={"in_channels": 4, "sample_size": 8, "predicts_variance": True},
        scheduler=_ddim(),
        call={
            **_SMALL,
            **_PROMPT,
            **_UNGUIDED,
            "video_length": 9,
            "clean_caption": False,
            "mask_feature": False,
        },
    ),
    "anyflow": Whole(
        pipeline="AnyFlowPipeline",
        vae="anyflow",
        denoiser={"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2)},
        call={**_SMALL, **_PROMPT, **_UNGUIDED, "num_frames": 9},
    ),
    "kandinsky5-video": Whole(
        pipeline="Kandinsky5T2VPipeline",
        vae="kandinsky5-video",
        denoiser={"in_visual_dim": 16, "patch_size": (1, 2, 2), "attention_type": "regular", "visual_cond": False},
        call={
            **_SMALL,
            "prompt_embeds_qwen": text,
            "prompt_embeds_clip": lambda: text()[:, 0],
            "prompt_cu_seqlens": lambda: torch.tensor([0, 3, 6], dtype=torch.int32),
            **_UNGUIDED,
            "num_frames": 9,
        },
    ),
    "z-image": Whole(
        pipeline="ZImagePipeline",
        vae="z-image",
        denoiser={"in_channels": 16},
        call={**_SMALL, "prompt_embeds": lambda: list(text()), "guidance_scale": 0.0},
    ),
    "easyanimate": Whole(
        pipeline="EasyAnimatePipeline",
        vae="easyanimate",
        denoiser={"in_channels": 16, "enable_text_attention_mask": False},
        call={**_SMALL, **_MASKED, **_UNGUIDED, "num_frames": 9},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a pipeline made."""

    pipeline: Any
    #: `output_type="latent"`.
    latents: torch.Tensor
    #: What it gave its image processor.
    decoded: torch.Tensor
    #: `output_type="pil"`, as arrays.
    pixels: npt.NDArray[np.uint8]


def _reference(case: Whole, catalog: Path) -> Reference:
    vae = _vae(catalog.parent / case.vae)
    pipeline = build(case, vae)
    latents = call(pipeline, case, "latent")
    caught = _catch_postprocessed(pipeline)
    pictures = call(pipeline, case, "pil")
    return Reference(
        pipeline=pipeline,
        latents=latents,
        decoded=caught[-1],
        pixels=np.stack([_pixels(item) for item in pictures]),
    )


def _catch_postprocessed(pipeline: Any) -> list[torch.Tensor]:
    """Makes the pipeline's image or video processor note what it is given; returns the notes."""
    caught: list[torch.Tensor] = []
    name = "video_processor" if hasattr(pipeline, "video_processor") else "image_processor"
    method = "postprocess_video" if name == "video_processor" else "postprocess"
    processor = getattr(pipeline, name)
    original = getattr(processor, method)

    def noting(*args: Any, **options: Any) -> Any:
        given: Any = args[0] if args else options.get("video", options.get("image"))
        caught.append(given.clone())
        return original(*args, **options)

    setattr(processor, method, noting)
    return caught


@pytest.fixture(scope="module")
def family_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_catalog(tmp_path_factory.mktemp("families"), {case.vae for case in CASES.values()})


@pytest.fixture(scope="module")
def families(family_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A client whose jobs a worker process decodes, in float32 on the CPU."""
    vaes = tuple(sorted({case.vae for case in CASES.values()}))
    with serving(tmp_path_factory.mktemp("families-broker"), catalog=family_catalog, vaes=vaes) as started:
        yield started


@pytest.fixture(scope="module")
def references(family_catalog: Path, pipelines_importable: None) -> Iterator[Callable[[str], Reference]]:
    """The reference of a case, made once."""
    made = functools.cache(lambda name: _reference(CASES[name], family_catalog))
    yield made
    made.cache_clear()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # schedulers, with numpy 2
@pytest.mark.parametrize("name", CASES)
def test_a_worker_sends_back_what_the_pipeline_would_have_returned(
    name: str, references: Callable[[str], Reference], families: Serving
) -> None:
    case, expected = CASES[name], references(name)
    assert len(np.unique(expected.pixels)) > 32, "a flat picture is equal to any other"
    given = {"pipeline": expected.pipeline, **case.given}
    job = families.decode(expected.latents, output="tensor", **given)
    made = job.tensor()
    assert made.dtype == expected.decoded.dtype == torch.float32
    assert torch.equal(made, expected.decoded)
    assert job.snapshot().vae == case.vae
    pixels = families.decode(expected.latents, output="uint8", **given).array()
    assert np.array_equal(pixels, expected.pixels)


def test_rgba_is_in_the_png_and_in_the_webp(references: Callable[[str], Reference], families: Serving) -> None:
    name = "qwen-image-21, RGBA"
    expected = references(name)
    assert expected.pixels.shape[-1] == 4
    given = {"pipeline": expected.pipeline, **CASES[name].given}
    pictures = families.decode(expected.latents, output="png", **given).images()
    assert {picture.mode for picture in pictures} == {"RGBA"}
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected.pixels)
    assert {item.mode for item in families.decode(expected.latents, output="webp", **given).images()} == {"RGBA"}


def test_latents_that_are_not_contiguous_are_among_these(references: Callable[[str], Reference]) -> None:
    assert [name for name in ("anyflow", "helios", "ltx", "flux2") if references(name).latents.is_contiguous()] == [
        "anyflow"
    ]


def test_the_catalogue_of_this_test_is_ours_with_other_weights(family_catalog: Path) -> None:
    ours, tiny = VaeCatalog.load(), VaeCatalog.load(family_catalog)
    for name in {case.vae for case in CASES.values()}:
        changed = {"weights", "subfolder", "revision", "source"}
        assert tiny[name].model_dump(exclude=changed) == ours[name].model_dump(exclude=changed)
