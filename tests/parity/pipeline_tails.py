"""The end of each diffusers pipeline, cut out of its own source: what it does once its latents are done.

A pipeline's `__call__` ends with `if output_type == "latent": … else: …`. From that statement on it is run here, on a
bare object of the pipeline's class, with latents and sizes set. What it hands to its image processor is the reference:
diffusers' own lines, of every pipeline there is, without a denoiser. Whole pipelines are in the tests beside this one.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from tests.parity.whole_pipelines import frozen

PIPELINES_FOLDER = Path(diffusers.__path__[0]) / "pipelines"


@functools.cache
def classes_with_latents() -> dict[str, str]:
    """Every class under `diffusers.pipelines` whose `__call__` mentions latents as an output: name → module."""
    found = {}
    for path in sorted(PIPELINES_FOLDER.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(_mentions_latents(item) for item in node.body):
                relative = path.relative_to(PIPELINES_FOLDER.parent).with_suffix("")
                found[node.name] = ".".join(("diffusers", *relative.parts))
    return found


def load(name: str) -> Any:
    """A class with latents. Some of the oldest warn of themselves as they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(classes_with_latents()[name]), name)


def _mentions_latents(node: ast.stmt) -> bool:
    if not isinstance(node, ast.FunctionDef) or node.name != "__call__":
        return False
    return any(isinstance(item, ast.Constant) and item.value == "latent" for item in ast.walk(node))


class Caught:
    """An image or video processor that notes what it is given."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.given: torch.Tensor | None = None

    def postprocess(self, image: torch.Tensor, *args: Any, **options: Any) -> Any:
        self.given = image.clone()
        return self._processor.postprocess(image, *args, **options)

    def postprocess_video(self, video: torch.Tensor, *args: Any, **options: Any) -> Any:
        self.given = video.clone()
        return self._processor.postprocess_video(video, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)


def run_tail(kind: type, vae: Any, start: torch.Tensor, **known: Any) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """What `kind` makes of its latents: the tensor before postprocessing, and the PIL pictures' pixels.

    Args:
        kind: a pipeline class.
        vae: its VAE.
        start: what it returns for `output_type="latent"`, before what it does only for that.
        known: variables of `__call__`, and attributes of the pipeline (those that start with `self_`).
    """
    pipeline = _bare(kind, vae, {key[5:]: value for key, value in known.items() if key.startswith("self_")})
    caught = Caught(pipeline.image_processor)
    pipeline.__dict__ |= {"image_processor": caught, "video_processor": caught}
    variables: dict[str, Any] = {
        "self": pipeline,
        "latents": start,
        "device": torch.device("cpu"),
        "output_type": "pil",
        "return_dict": True,
        "generator": None,
        "batch_size": start.shape[0],
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "padding_mask_crop": None,
        "has_nsfw_concept": None,
        "num_channels_latents": start.shape[-1],
        **{
            name: SimpleNamespace(dtype=start.dtype)
            for name in ("prompt_embeds", "text_embeddings", "image_embeddings")
        },
        **{key: value for key, value in known.items() if not key.startswith("self_")},
    }
    module = sys.modules[kind.__module__]
    variables = {**vars(module), **variables}
    decoded: list[torch.Tensor] = []
    variables["_decoded"] = decoded
    _note_decodes(vae, decoded)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of methods that are deprecated
            exec(_tail(kind), variables)
    finally:
        del vae.decode
    if caught.given is None:
        return _postprocessed_by_itself(variables)
    pictures = caught._processor
    made = (
        pictures.postprocess_video(caught.given, output_type="pil")
        if caught.given.ndim == 5
        else pictures.postprocess(caught.given, output_type="pil")
    )
    pixels = [
        np.stack([np.asarray(frame) for frame in item]) if isinstance(item, list) else np.asarray(item) for item in made
    ]
    return caught.given, np.stack(pixels)


def _note_decodes(vae: Any, notes: list[torch.Tensor]) -> None:
    original = vae.decode

    def noting(*args: Any, **options: Any) -> Any:
        made = original(*args, **options)
        notes.append(made[0] if isinstance(made, tuple) else made.sample)
        return made

    vae.decode = noting


def _postprocessed_by_itself(variables: dict[str, Any]) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """Of pipelines with a `decode_latents` that returns numpy in [0, 1], made into PIL pictures or not."""
    (decoded,) = variables["_decoded"]
    pictures = variables["image"]
    if isinstance(pictures, np.ndarray):
        pictures = DiffusionPipeline.numpy_to_pil(pictures)
    return decoded, np.stack([np.asarray(picture) for picture in pictures])


def _bare(kind: Any, vae: Any, attributes: dict[str, Any]) -> Any:
    """An object of a pipeline's class without its parts, but for what decoding reads."""

    def no_checker(self: Any, image: Any, *_: Any) -> Any:
        return (image, None, None) if kind.__name__ == "StableDiffusionUpscalePipeline" else (image, None)

    bare: Any = type(
        kind.__name__,
        (kind,),
        {"_execution_device": torch.device("cpu"), "run_safety_checker": no_checker, "components": {}},
    )
    pipeline: Any = bare.__new__(bare)
    named = re.findall(r"self\.(?:image|video)_processor = (\w+Processor)\(", inspect.getsource(kind))
    module = sys.modules[kind.__module__]
    known = [getattr(module, name) for name in named if hasattr(module, name)]
    video = [item for item in known if issubclass(item, VideoProcessor)]
    processor = (*video, *known, VaeImageProcessor)[0](vae_scale_factor=8)
    defaults = {
        "_internal_dict": frozen({}),
        "vae": vae,
        "image_processor": processor,
        "safety_checker": None,
        "watermark": None,
        "watermarker": None,
        "vae_scale_factor": 8,
        "_current_timestep": None,
        **attributes,
    }
    pipeline.__dict__.update(defaults)
    return pipeline


@functools.cache
def _tail(kind: type) -> Any:
    """The statements of `__call__` from where the latents are done, without what returns or clears up."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__)))
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    start = next(i for i, statement in enumerate(function.body) if _decides_output(statement))
    body = [statement for statement in function.body[start:] if not _clears_up(statement)]
    module = ast.Module(body=[_without_returns(statement) for statement in body], type_ignores=[])
    return compile(ast.fix_missing_locations(module), f"<the end of {kind.__name__}>", "exec")


def _decides_output(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.If):
        return False
    test = ast.unparse(statement.test)
    return "output_type" in test and "'latent'" in test and "not in" not in test and "self.vae is None and" not in test


def _clears_up(statement: ast.stmt) -> bool:
    text = ast.unparse(statement)
    if isinstance(statement, ast.Return) or text.startswith("if not return_dict"):
        return True
    return any(word in text for word in ("maybe_free", "set_attn_processor", "final_offload_hook", "XLA_AVAILABLE"))


class _without(ast.NodeTransformer):
    def visit_Return(self, node: ast.Return) -> ast.stmt:
        return ast.copy_location(ast.Pass(), node)


def _without_returns(statement: ast.stmt) -> ast.stmt:
    visited: ast.stmt = _without().visit(statement)
    return visited
