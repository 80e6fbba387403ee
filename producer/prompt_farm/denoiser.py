"""Runs a diffusers pipeline on tasks, up to the latents. torch and diffusers are imported when one is loaded or run.

Each task has a generator of its own on the CPU, so that a seed means the same noise on every device and in every batch.
A batch changes last bits of what is denoised, as it does in diffusers; whatever is decoded is decoded alone.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from broker_config.errors import ConfigurationError, InvalidOption
from broker_config.vae_catalog import VaeCatalog
from producer.pipeline_table import EXCEPTED, PIPELINES
from producer.pipelines import lookup
from producer.prompt_farm.facts import ARGUMENTS, DENOISERS, check_noise, facts_of, size_options
from producer.prompt_farm.plan import Task

if TYPE_CHECKING:
    import torch

_INDEX: Final = "model_index.json"
#: Files that make a pipeline what it is; a model card is none.
_WEIGHTS: Final = (".json", ".safetensors", ".txt", ".model")
#: Parts that look at finished pictures: latents never meet them.
_AFTER_DECODE: Final = ("vae", "safety_checker")


class Denoiser:
    """A loaded pipeline. Not thread-safe."""

    def __init__(
        self, pipeline: Any, *, catalog: VaeCatalog, vae: str | None = None, folder: Path | None = None
    ) -> None:
        """Args:
        pipeline: a diffusers pipeline, with or without its VAE.
        catalog: where its VAE is looked up.
        vae: catalogue entry to decode with; None: what the table of pipelines says.
        folder: what it was loaded from, which may have the config of the VAE it was loaded without.

        Raises:
            InvalidOption, UnknownPipeline, UnknownVae: as `facts_of` and `check_noise`.
        """
        self.pipeline = pipeline
        whole = pipeline if folder is None else with_own_vae(pipeline, folder)
        described = pipeline if vae is not None else whole
        self.facts = facts_of(pipeline, vae=vae, catalog=catalog, described=described)
        check_noise(catalog[self.facts.vae], getattr(whole, "vae", None), name=self.facts.name)
        #: Options of a submit that tell whose latents they are.
        self.options: dict[str, Any] = {"vae": vae} if vae is not None else {}
        if self.facts.name in PIPELINES:
            self.options["pipeline"] = described
        if hasattr(pipeline, "set_progress_bar_config"):
            pipeline.set_progress_bar_config(disable=True)

    def latents_of(self, tasks: Sequence[Task]) -> list[torch.Tensor]:
        """Latents of tasks that share a `call`, each as a batch of one, on the device.

        Raises:
            InvalidOption: the pipeline returned another number of them.
            Exception: whatever the pipeline raises.
        """
        import torch

        generators = [torch.Generator("cpu").manual_seed(task.seed) for task in tasks]
        arguments = self._arguments(tasks)
        with torch.inference_mode():
            made = self.pipeline(
                **arguments,
                generator=generators if len(tasks) > 1 else generators[0],
                output_type="latent",
                return_dict=False,
            )
        latents: torch.Tensor = made[0]
        if len(tasks) == 1:
            return [latents]
        if not isinstance(latents, torch.Tensor) or latents.shape[0] != len(tasks):
            raise InvalidOption(
                f"{self.facts.name} returned no latents of {len(tasks)} prompts: use batch_size 1", field="batch_size"
            )
        return [latents[number : number + 1] for number in range(len(tasks))]

    def wait(self) -> None:
        """Returns when the device has done what it was told; only then is a stopwatch true."""
        import torch

        device = getattr(self.pipeline, "_execution_device", None)
        if getattr(device, "type", None) == "cuda":
            torch.cuda.synchronize(device)

    def _arguments(self, tasks: Sequence[Task]) -> dict[str, Any]:
        row = tasks[0].row
        arguments: dict[str, Any] = dict(size_options(tasks[0], self.facts))
        for field in ("steps", "guidance"):
            value = getattr(row, field)
            if value is not None:
                arguments[ARGUMENTS[field]] = value
        prompts = [task.row.prompt for task in tasks]
        arguments["prompt"] = prompts if len(tasks) > 1 else prompts[0]
        if row.negative_prompt is not None:
            negative = [task.row.negative_prompt for task in tasks]
            arguments["negative_prompt"] = negative if len(tasks) > 1 else negative[0]
        return arguments


def class_in(folder: Path) -> str:
    """The pipeline class that a folder in diffusers' format is of.

    Raises:
        ConfigurationError: it is not such a folder.
    """
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return str(index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigurationError(
            f"{folder} has no {_INDEX} that names a pipeline: save one there with `pipe.save_pretrained`",
            field="pipeline",
        ) from None


def folder_of(source: str, *, revision: str | None = None) -> Path:
    """The folder of a pipeline: `source` itself, or where the hub's files are kept once they are downloaded.

    Raises:
        ConfigurationError: no such folder, and nothing to be had from the hub.
    """
    if Path(source).expanduser().is_dir():
        return Path(source).expanduser().absolute()
    if source.startswith((".", "/", "~")):
        raise ConfigurationError(f"there is no folder {source}", field="pipeline")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(source, revision=revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"the pipeline {source} is neither a folder nor to be had from the hub: {first[:300]}", field="pipeline"
        ) from None


def load_pipeline(
    folder: Path, *, device: str, dtype: str | None, compiled: bool, stand_in: Callable[[], Any] | None = None
) -> Any:
    """The pipeline in a folder, without its VAE, on a device.

    Args:
        folder: in diffusers' format, weights as safetensors.
        stand_in: makes what stands in for the VAE, without weights, for pipelines that ask it for its config when they
            are made.
        device: `cuda:0`, `cpu`, …; auto: the first CUDA device, else the CPU.
        dtype: of the weights; None: bfloat16 on CUDA, float32 on a CPU.
        compiled: whether to compile what denoises.

    Raises:
        UnknownPipeline: latents of its class cannot be decoded here.
        ConfigurationError: it cannot be loaded, or not on this device.
    """
    import diffusers
    import torch

    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    without: dict[str, Any] = {part: None for part in _AFTER_DECODE if part in index}
    if "safety_checker" in index:
        without["requires_safety_checker"] = False
    kind = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    source: Any = diffusers.DiffusionPipeline
    try:
        try:
            pipeline = source.from_pretrained(folder, dtype=kind, use_safetensors=True, **without)
        except AttributeError:  # `self.vae.config` of no VAE
            if stand_in is None or without.get("vae", "") is not None:
                raise
            pipeline = source.from_pretrained(folder, dtype=kind, use_safetensors=True, **without | {"vae": stand_in()})
        pipeline = pipeline.to(device)
    except (OSError, ValueError, RuntimeError, AttributeError, ImportError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigurationError(
            f"the pipeline in {folder} cannot be loaded on {device}: {first[:300]}", field="pipeline"
        ) from error
    if compiled:
        for part in DENOISERS:
            _compile(getattr(pipeline, part, None))
    return pipeline


def vae_config_in(folder: Path) -> Mapping[str, Any] | None:
    """Config of the VAE that lies in a pipeline's folder; None: there is none."""
    try:
        config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and "_class_name" in config else None


def with_own_vae(pipeline: Any, folder: Path) -> Any:
    """The pipeline as `options_of` reads it, with the config of the VAE that lies in its folder.

    It was loaded without that VAE; its config still tells which of several it is, and the worker compares it with its
    own.
    """
    config = vae_config_in(folder)
    if config is None:
        return pipeline
    vae = type(str(config["_class_name"]), (), {"config": MappingProxyType(config)})()
    view = type(type(pipeline).__name__, (), {"vae": vae, "__getattr__": lambda self, item: getattr(pipeline, item)})
    return view()


def check_class(name: str, *, vae: str | None) -> None:
    """Whether latents of this pipeline class can be decoded, as far as its name tells.

    Raises:
        UnknownPipeline: they cannot, or nobody said with which VAE.
    """
    if vae is None or name in EXCEPTED:
        lookup(name)


def identity_of(folder: Path) -> str:
    """What says which weights are in a folder: the name of its class and a digest that a copy of it has, too.

    Weights are gigabytes, so of each file only its size and some pieces count: two trainings of one model differ in
    each of them.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix not in _WEIGHTS or name.parts[0] == "vae" or any(part.startswith(".") for part in name.parts):
            continue
        digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode())
        for piece in _pieces(path):
            digest.update(piece)
    return f"{class_in(folder)}:{digest.hexdigest()[:16]}"


def _pieces(path: Path, *, count: int = 16, length: int = 4096) -> list[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= count * length:
            return [file.read()]
        pieces = []
        for number in range(count):
            file.seek((size - length) * number // (count - 1))
            pieces.append(file.read(length))
        return pieces


def _compile(module: Any) -> None:
    if module is None:
        return
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks(fullgraph=True)  # one block is compiled in place of all of them
    else:
        module.compile()


def quiet_libraries() -> None:
    """Libraries that load models draw bars and give advice; whoever runs a farm has a display of his own."""
    warnings.simplefilter("ignore")
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
