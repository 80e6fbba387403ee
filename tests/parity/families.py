"""Every family's whole pipelines, and what diffusers makes of each: the reference of the parity tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
)
from tests.parity.whole_pipelines import Whole, build, call

#: Case → pipeline.
CASES: Mapping[str, Whole] = {
    **families_of_pictures.CASES,
    **families_of_tokens.CASES,
    **families_of_frames.CASES,
    **families_of_clips.CASES,
    **families_of_other_vaes.CASES,
    **families_of_sections.CASES,
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


def reference(case: Whole, vae: Any) -> Reference:
    """What the pipeline makes of two calls with the same seed."""
    pipeline = build(case, vae)
    latents = call(pipeline, case, "latent")
    caught = _note_postprocessed(pipeline)
    pictures = call(pipeline, case, "pil")
    return Reference(
        pipeline=pipeline,
        latents=latents,
        decoded=caught[0],
        pixels=np.stack([pixels_of(item) for item in pictures]),
    )


def pixels_of(made: Any) -> npt.NDArray[np.uint8]:
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


def _noted(notes: list[torch.Tensor], method: Callable[..., Any], *args: Any, **options: Any) -> Any:
    given: Any = args[0] if args else options.get("video", options.get("image"))
    notes.append(given.clone())
    return method(*args, **options)
