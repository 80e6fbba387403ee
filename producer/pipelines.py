"""From a diffusers pipeline to what a job must say of its latents: VAE, layout, and the facts read off the pipeline.

`client.submit(latents, pipeline=pipe)` looks the pipeline's class up by name in `PIPELINES` (`pipeline_table.py`), so a
pipeline may have been loaded with `vae=None`, and nothing of diffusers or torch is imported here. An option the caller
names wins over what is read off.

Not part of what the VAE returns, and so left to the caller: watermarks, safety checkers, and the overlay that
inpainting pipelines lay over a crop (`padding_mask_crop`).
"""

from __future__ import annotations

import base64
import difflib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from broker_config.errors import InvalidOption, UnknownPipeline
from broker_config.vae_catalog import VaeCatalog
from broker_config.vae_identity import config_digest

#: Names an error lists.
_NEAR_NAMES: Final = 5

#: Reads a fact off a pipeline, where need be with the caller's own options.
Reader = Callable[[Any, Mapping[str, Any]], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineEntry:
    """What is known of a pipeline class."""

    #: Catalogue name, or what chooses one by the pipeline's parts.
    vae: str | Callable[[Any], str]
    #: None: the one that fits the latents' rank.
    layout: str | None = None
    #: None: the catalogue's.
    state: str | None = None
    #: Options with fixed values.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: Options read off the pipeline; a reader that returns None leaves its option out.
    readers: Mapping[str, Reader] = field(default_factory=dict)

    def vae_of(self, pipeline: Any) -> str:
        """The catalogue's name for the pipeline's VAE."""
        return self.vae if isinstance(self.vae, str) else self.vae(pipeline)


def options_of(pipeline: Any, given: Mapping[str, Any], *, catalog: VaeCatalog) -> dict[str, Any]:
    """Options of a job with latents of `pipeline`.

    Args:
        pipeline: a diffusers pipeline, with or without its VAE; or the name of its class, from which no facts are read.
        given: the caller's options, which win.
        catalog: where the VAE is looked up.

    Raises:
        UnknownPipeline: not in the table; names near ones, or the reason why it is not in it.
        UnknownVae: the catalogue lacks the VAE.
        InvalidOption: the pipeline is set up in a way whose latents do not tell its pictures, or its VAE is of another
            class than the catalogue's.
    """
    if isinstance(pipeline, str):
        entry, pipeline = lookup(pipeline), None
    else:
        entry = lookup(type(pipeline).__name__)
    options: dict[str, Any] = {"vae": entry.vae_of(pipeline)}
    if entry.layout is not None:
        options["layout"] = entry.layout
    if entry.state is not None:
        options["state"] = entry.state
    options |= entry.options
    options |= {name: value for name, read in entry.readers.items() if (value := read(pipeline, given)) is not None}
    options |= given
    module = getattr(pipeline, "vae", None)
    if module is not None and "vae" not in given:
        options = _identity(module, catalog[options["vae"]].vae_class, pipeline) | options
    return options


def noise_state(generator: Any) -> str:
    """A torch generator as a job carries it, so that a worker draws what it would have drawn next.

    Raises:
        InvalidOption: not a generator on the CPU: what others draw depends on their device.
    """
    device = getattr(getattr(generator, "device", None), "type", None)
    if device != "cpu":
        raise InvalidOption(
            f"generator is {type(generator).__name__} on {device}, expected a torch.Generator on the CPU: give the "
            "pipeline one",
            field="generator",
        )
    return base64.urlsafe_b64encode(zlib.compress(generator.get_state().numpy().tobytes())).decode().rstrip("=")


def lookup(name: str) -> PipelineEntry:
    """The entry of a pipeline class.

    Raises:
        UnknownPipeline: there is none.
    """
    from producer.pipeline_table import EXCEPTED, PIPELINES  # late: its readers are in this module's terms

    if name in PIPELINES:
        return PIPELINES[name]
    if name in EXCEPTED:
        raise UnknownPipeline(f"latents of {name} cannot be decoded here: {EXCEPTED[name]}", field="pipeline")
    near = difflib.get_close_matches(name, PIPELINES, n=_NEAR_NAMES, cutoff=0.5)
    known = f"near it are {', '.join(near)}" if near else "no name is near it; docs/vaes.md lists those there are"
    raise UnknownPipeline(
        f"no pipeline class {name!r} in the table; {known}. For a class of your own, give vae, layout and state",
        field="pipeline",
    )


def served_by(vae: str) -> list[str]:
    """Pipeline classes whose latents this entry decodes, unless a pipeline's own parts tell otherwise."""
    from producer.pipeline_table import PIPELINES

    return sorted(name for name, entry in PIPELINES.items() if entry.vae_of(None) == vae)


def config_of(pipeline: Any, part: str) -> Mapping[str, Any]:
    """The config of a part of a pipeline; empty where it has no such part."""
    config = getattr(getattr(pipeline, part, None), "config", None)
    return config if isinstance(config, Mapping) else {}


def _identity(module: Any, expected_class: str, pipeline: Any) -> dict[str, Any]:
    """What the worker's VAE must be: the class and the config of the pipeline's own."""
    found = type(module).__name__
    if found != expected_class:
        raise InvalidOption(
            f"vae of {type(pipeline).__name__} is a {found}, the catalogue's is a {expected_class}: name an entry with "
            f"a {found} as `vae`",
            field="vae",
        )
    return {"vae_class": found, "vae_config": config_digest(config_of(pipeline, "vae"))}
