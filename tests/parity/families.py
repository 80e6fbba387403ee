"""The whole pipelines of every family, and what diffusers makes of each: the reference of the parity tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.parity import (
    families_of_clips,
    families_of_frames,
    families_of_other_vaes,
    families_of_pictures,
    families_of_sections,
    families_of_tokens,
    others_of_clips,
    others_of_models,
    others_of_old_unets,
    others_of_transformers,
    others_of_unets,
)
from tests.parity.whole_pipelines import Whole, build, call, diffusers_class

#: Case → pipeline: one of each family, or more where it has several layouts.
CASES: Mapping[str, Whole] = {
    **families_of_pictures.CASES,
    **families_of_tokens.CASES,
    **families_of_frames.CASES,
    **families_of_clips.CASES,
    **families_of_other_vaes.CASES,
    **families_of_sections.CASES,
}
#: The same of the families' other classes.
OTHERS: Mapping[str, Whole] = {
    **others_of_unets.CASES,
    **others_of_old_unets.CASES,
    **others_of_transformers.CASES,
    **others_of_clips.CASES,
    **others_of_models.CASES,
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a pipeline made."""

    pipeline: Any
    #: `output_type="latent"`.
    latents: torch.Tensor
    #: What it gave its image processor.
    decoded: torch.Tensor
    #: `output_type="pil"`, as arrays; of a high dynamic range floats.
    pixels: npt.NDArray[Any]


def reference(case: Whole, vae: Any) -> Reference:
    """What the pipeline makes of two calls with the same seed."""
    pipeline = build(case, vae)
    latents = call(pipeline, case, "latent")
    caught, returned = _note_postprocessed(pipeline), _note_returned(pipeline.vae)
    pictures = call(pipeline, case, "pil")
    if isinstance(pictures, np.ndarray) and pictures.ndim == 4:  # Text2Video-Zero makes no others
        pictures = diffusers_class("DiffusionPipeline").numpy_to_pil(pictures)
    decoded, pixels = (caught or returned)[0], np.stack([pixels_of(item) for item in pictures])
    if pixels.dtype != np.uint8:  # of a high dynamic range: light, with channels last
        decoded = torch.from_numpy(pixels).movedim(-1, 1)
    return Reference(
        pipeline=pipeline,
        latents=latents,
        decoded=decoded[:, :, case.own_frames :] if case.own_frames else decoded,
        pixels=pixels[:, case.own_frames :] if case.own_frames else pixels,
    )


def reference_in(folder: Path, case: Whole) -> Reference:
    """`reference` with the VAE that a worker loads: from beside the catalogue."""
    vae_class = json.loads((folder / case.vae / "config.json").read_text())["_class_name"]
    return reference(case, diffusers_class(vae_class).from_pretrained(folder / case.vae, low_cpu_mem_usage=False))


def pixels_of(made: Any) -> npt.NDArray[Any]:
    """Of one picture, or of the list of pictures that is a clip."""
    return np.stack([np.asarray(frame) for frame in made]) if isinstance(made, list) else np.asarray(made)


def _note_postprocessed(pipeline: Any) -> list[torch.Tensor]:
    """Makes the pipeline's processors note what they are given; returns the notes.

    The first is what the VAE returned: clips are postprocessed picture by picture, and Cosmos postprocesses again what
    its guardrail has seen.
    """
    notes: list[torch.Tensor] = []
    for owner in ("image_processor", "video_processor"):
        for name in ("postprocess", "postprocess_video"):
            method = getattr(getattr(pipeline, owner, None), name, None)
            if method is not None:
                setattr(getattr(pipeline, owner), name, functools.partial(_noted, notes, method))
    return notes


def _note_returned(vae: Any) -> list[torch.Tensor]:
    """The same of what the VAE returns: of pipelines that postprocess by themselves."""
    notes: list[torch.Tensor] = []
    decode = vae.decode

    def noting(*args: Any, **options: Any) -> Any:
        made = decode(*args, **options)
        notes.append(made[0].clone())
        return made

    vae.decode = noting
    return notes


def _noted(notes: list[torch.Tensor], method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    given: Any = args[0] if args else options.get("video", options.get("image"))
    notes.append(given.clone())
    return method(*args, **options)
