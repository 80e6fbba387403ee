"""Whole diffusers pipelines around tiny VAEs, and what each wants to be called with.

Everything between the call and the pictures is diffusers' own, but for two parts a pipeline gets handed: the VAE, tiny
and random, and the denoiser, which stands in for a transformer of billions of weights. What it predicts does not
matter: what comes of it must be decoded alike on both ways.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import configuration_utils

#: Width of prompt embeddings.
TEXT = 8
#: Latent size: not square.
ROWS, COLUMNS = 6, 8


#: A config as diffusers has it, which its classes make without types.
frozen: Any = configuration_utils.FrozenDict


class _Answer(tuple[torch.Tensor]):
    """What a denoiser returns, as a tuple or as an output object."""

    @property
    def sample(self) -> torch.Tensor:
        return self[0]


class Denoiser(torch.nn.Module):
    """Stands in for a transformer: predicts something of the right shape that depends on what it is given."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = frozen(config)
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        #: Some pipelines read these off the transformer itself.
        self.in_channels = config.get("in_channels")
        self.visual_cond = config.get("visual_cond")
        self.transformer_blocks: tuple[torch.nn.Module, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        yield

    def forward(self, hidden_states: Any = None, *_: Any, **options: Any) -> Any:
        if hidden_states is None:
            hidden_states = options["x"]
        if isinstance(hidden_states, list):  # Z-Image: a picture each
            return ([torch.tanh(item) * self.weight + 0.1 for item in hidden_states],)
        hidden_states = hidden_states[:, : self.config.get("out_channels", hidden_states.shape[1])]
        if self.config.get("predicts_variance"):
            hidden_states = torch.cat([hidden_states, hidden_states], dim=1)
        return _Answer((torch.tanh(hidden_states) * self.weight + 0.1,))


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A pipeline, its call, and what a caller says of its latents."""

    #: Class in diffusers.
    pipeline: str
    #: Entry of the catalogue.
    vae: str
    #: Config of the denoiser.
    denoiser: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Callable[[], Any] = lambda: diffusers_class("FlowMatchEulerDiscreteScheduler")()
    #: More parts of the pipeline.
    parts: Mapping[str, Any] = field(default_factory=dict)
    #: Arguments of the call.
    call: Mapping[str, Any] = field(default_factory=dict)
    #: What a caller says beside the pipeline.
    given: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 2
    #: What to do to the VAE first.
    prepare: Callable[[Any], None] = lambda vae: None


def diffusers_class(name: str) -> Any:
    """A class of diffusers; looked up late, since its pipelines take seconds to import."""
    return getattr(importlib.import_module("diffusers"), name)


def build(case: Whole, vae: Any) -> Any:
    """The pipeline of a case."""
    kind = diffusers_class(case.pipeline)
    wanted = inspect.signature(kind.__init__).parameters
    required = [name for name, item in wanted.items() if item.default is inspect.Parameter.empty]
    parts: dict[str, Any] = dict.fromkeys(name for name in required if name != "self")
    case.prepare(vae)
    own = {name: part() if callable(part) else part for name, part in case.parts.items()}
    parts |= {"vae": vae, "scheduler": case.scheduler(), "transformer": Denoiser(**case.denoiser), **own}
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: Any, case: Whole, output_type: str) -> Any:
    """What the pipeline returns first."""
    arguments = {key: value() if callable(value) else value for key, value in case.call.items()}
    made = pipeline(
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(13),
        output_type=output_type,
        return_dict=False,
        **arguments,
    )
    return made[0]


def text(batch: int = 2, length: int = 3) -> torch.Tensor:
    """Prompt embeddings."""
    return torch.randn(batch, length, TEXT, generator=torch.Generator().manual_seed(11))


def mask(batch: int = 2, length: int = 3) -> torch.Tensor:
    """Which of them count."""
    return torch.ones(batch, length, dtype=torch.long)
