"""Whole diffusers pipelines of tiny random parts, and what each wants to be called with.

Everything between the call and the pictures is diffusers' own: its denoisers with few and narrow layers, its
schedulers, its VAEs. What is left out is what turns words into numbers: prompts come as embeddings where the pipeline
takes them, and where it takes words only, its method that would run a text or image encoder is given its answer, or
runs a tiny one (`tiny_clip.py`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from diffusers import configuration_utils
from PIL import Image

#: Class of a denoiser in diffusers → a config of few and narrow layers.
TINY: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("tiny_denoisers.yaml").read_text(encoding="utf-8")
)
#: What the UNet of SDXL has besides: sizes and pooled embeddings.
CONDITIONED_BY_SIZE: Mapping[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 8,
}
#: Width of prompt embeddings, as these configs have it.
TEXT = 8
#: Latent size: not square.
ROWS, COLUMNS = 6, 8
#: The same in pixels, by the VAE's compression.
SMALL = {"height": ROWS * 8, "width": COLUMNS * 8}
LARGE = {"height": ROWS * 16, "width": COLUMNS * 16}
HUGE = {"height": ROWS * 32, "width": COLUMNS * 32}
UNGUIDED = {"guidance_scale": 1.0}

#: A config as diffusers has it, which its classes make without types.
frozen: Any = configuration_utils.FrozenDict


#: Whole pipelines of test_remote_vae_families.py → entry of the catalogue.
REMOTE_VAE_PIPELINES = {
    "StableDiffusionPipeline": "sd",
    "AnimateDiffPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "FluxPipeline": "flux",
    "HunyuanVideoPipeline": "hunyuanvideo",
}


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A pipeline, its call, and what a caller says of its latents."""

    #: Class in diffusers.
    pipeline: str
    #: Entry of the catalogue.
    vae: str
    #: The denoiser's class in diffusers.
    denoiser: str
    #: What its config has beside or instead of what `TINY` says.
    config: Mapping[str, Any] = field(default_factory=dict)
    #: What the pipeline calls it.
    part: str = "transformer"
    scheduler: Callable[[], Any] = lambda: diffusers_class("FlowMatchEulerDiscreteScheduler")()
    #: More parts of the pipeline; callables make them.
    parts: Mapping[str, Any] = field(default_factory=dict)
    #: Methods (dotted) that would run an encoder, or choose a size too large to test with → what they return.
    answers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    #: Names of the pipeline's module, or of another one (dotted): what a library that is no part of this would bring,
    #: sizes too large, or ways too slow.
    names: Mapping[str, Any] = field(default_factory=dict)
    #: Attributes that the pipeline's `__init__` sets to such sizes.
    sizes: Mapping[str, Any] = field(default_factory=dict)
    #: Arguments of the call; callables make them.
    call: Mapping[str, Any] = field(default_factory=dict)
    #: What a caller says beside the pipeline.
    given: Mapping[str, Any] = field(default_factory=dict)
    #: Prompts.
    batch: int = 2
    #: Whether its own way to hand latents out fails, so that a callback takes them.
    by_callback: bool = False
    #: Whether what it hands out does not tell the last bits of what it decodes.
    rounds: bool = False
    #: Frames of the caller's own clip, which it puts before those it decodes.
    own_frames: int = 0
    #: What to do to the VAE first.
    prepare: Callable[[Any], None] = lambda vae: None
    #: What to do with the pipeline before it is called.
    first: Callable[[Any], None] = lambda pipeline: None


def keeping_generators(case: Whole) -> tuple[Whole, list[torch.Generator]]:
    """The same, and the generators of its calls, in order: as each call leaves them."""
    made: list[torch.Generator] = []

    def generator() -> torch.Generator:
        made.append(torch.Generator().manual_seed(13))
        return made[-1]

    return replace(case, call={**case.call, "generator": generator}), made


def diffusers_class(name: str) -> Any:
    """A class of diffusers, by its name or by module and name; late, since its pipelines take seconds to import."""
    module, _, own = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some warn of what they use as they are imported
        return getattr(importlib.import_module(f"diffusers.{module}" if module else "diffusers"), own)


def tiny(denoiser: str, **config: Any) -> Any:
    """A denoiser of random weights, as `TINY` and `config` have it."""
    return diffusers_class(denoiser)(**{**TINY[denoiser], **config}).eval()


def build(case: Whole, vae: Any) -> Any:
    """The pipeline of a case."""
    kind = diffusers_class(case.pipeline)
    wanted = inspect.signature(kind.__init__).parameters
    required = [name for name, item in wanted.items() if item.default is inspect.Parameter.empty]
    parts: dict[str, Any] = dict.fromkeys(name for name in required if name not in ("self", "args", "kwargs"))
    case.prepare(vae)
    torch.manual_seed(7)  # the denoiser's weights
    parts |= {"vae": vae, case.part: tiny(case.denoiser, **case.config)}
    if "scheduler" in wanted:
        parts["scheduler"] = case.scheduler()
    parts |= {name: part() if callable(part) else part for name, part in case.parts.items()}
    with _own_names(kind, case):
        pipeline = kind(**parts)
    for dotted, answer in case.answers.items():
        *path, name = dotted.split(".")
        setattr(functools.reduce(getattr, path, pipeline), name, lambda *_, answer=answer, **__: answer())
    for name, size in case.sizes.items():
        setattr(pipeline, name, size)
    pipeline.set_progress_bar_config(disable=True)
    case.first(pipeline)
    return pipeline


@contextlib.contextmanager
def _own_names(kind: Any, case: Whole) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for dotted, value in case.names.items():
            module, _, name = dotted.rpartition(".")
            names = vars(importlib.import_module(module or kind.__module__))
            stack.enter_context(mock.patch.dict(names, {name: value}))
        yield


def call(pipeline: Any, case: Whole, output_type: str) -> Any:
    """What the pipeline returns first."""
    arguments = {key: value() if callable(value) else value for key, value in case.call.items()}
    given = {
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(13),
        "return_dict": False,
        "output_type": output_type,
    }
    known = inspect.signature(pipeline.__call__).parameters  # what upsamples latents has no steps
    given = {name: value for name, value in given.items() if name in known}
    seen: list[torch.Tensor] = []

    def take(_: Any, step: int, time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(tensors["latents"])
        return tensors

    torch.manual_seed(17)  # I2VGen-XL's latents of its picture are drawn without the generator it was given
    with _own_names(type(pipeline), case):
        if output_type == "latent" and case.by_callback:
            with contextlib.suppress(UnboundLocalError):
                pipeline(**{**given, "callback_on_step_end": take, **arguments})
            return seen[-1]
        made = pipeline(**{**given, **arguments})
    # The inpainting pipelines of Stable Diffusion XL and others return latents in their output class, whatever is asked
    first = made[0] if isinstance(made, tuple | Mapping) else made
    # Framepack: everything so far, after each section
    return first[-1] if output_type == "latent" and isinstance(first, list) else first


class Harmless:
    """A checker that finds nothing wrong with a prompt or a clip (Cosmos insists on one)."""

    def to(self, *_: Any) -> None: ...

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


#: Where the library of Cosmos's guardrail is not installed.
GUARDED = {"CosmosSafetyChecker": Harmless}


class NoEncoder(torch.nn.Module):
    """Where a pipeline asks an encoder it does not run for its numbers' type."""

    dtype = torch.float32
    device = torch.device("cpu")
    config: Any = frozen({})


def tokenizer() -> Any:
    """A tokenizer of a handful of words."""
    words = {word: number for number, word in enumerate(("<unk>", "<pad>", "<s>", "</s>", "a", "fox", "hen"))}
    own = importlib.import_module("tokenizers")
    model = own.Tokenizer(own.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = own.pre_tokenizers.Whitespace()
    return importlib.import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text(batch: int = 2, length: int = 3, width: int = TEXT) -> torch.Tensor:
    """Prompt embeddings."""
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(11))


def pooled() -> torch.Tensor:
    """Prompt embeddings, one to a prompt."""
    return text()[:, 0]


def mask(batch: int = 2, length: int = 3) -> torch.Tensor:
    """Which of them count."""
    return torch.ones(batch, length, dtype=torch.long)


def picture(*, height: int, width: int) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ends() -> torch.Tensor:
    """Where the prompts of a batch begin and end, counted on (Kandinsky)."""
    return torch.tensor([0, 3, 6], dtype=torch.int32)


def one_text() -> torch.Tensor:
    """Embeddings of one prompt."""
    return text(1)


def small_picture() -> Image.Image:
    """A picture of `SMALL` size."""
    return picture(**SMALL)


def no_guidance() -> Any:
    """A guider that leaves the prompt alone."""
    return diffusers_class("guiders.ClassifierFreeGuidance")(guidance_scale=1.0)


#: Prompt embeddings as most pipelines take them.
PROMPT: Mapping[str, Any] = {"prompt_embeds": text}
MASKED: Mapping[str, Any] = {"prompt_embeds": text, "prompt_attention_mask": mask}
#: Two prompts without guidance, and one with a picture.
FROM_WORDS: Mapping[str, Any] = {**SMALL, **PROMPT, **UNGUIDED}
FROM_MASKED_WORDS: Mapping[str, Any] = {**SMALL, **MASKED, **UNGUIDED}
FROM_PICTURE: Mapping[str, Any] = {**SMALL, **UNGUIDED, "prompt_embeds": one_text, "image": small_picture}


def euler(**config: Any) -> Callable[[], Any]:
    """The scheduler of flow matching, with a config."""
    return lambda: diffusers_class("FlowMatchEulerDiscreteScheduler")(**config)


def part(name: str, **config: Any) -> Callable[[], Any]:
    """A part of a pipeline: a scheduler, or another model beside its denoiser."""
    return lambda: diffusers_class(name)(**config)
