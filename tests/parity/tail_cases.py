"""What the last lines of a pipeline class need to run without the rest: latents, sizes, and what is its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from broker_config.vae_catalog import VaeCatalog
from producer.pipeline_table import PIPELINES


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Latents of a pipeline, and the variables its last lines read."""

    shape: tuple[int, ...]
    #: Variables of `__call__`, and with `self_` before them attributes of the pipeline.
    known: dict[str, Any] = field(default_factory=dict)
    #: What a caller says beside the pipeline.
    given: dict[str, Any] = field(default_factory=dict)


#: Rows and columns of latents: not square, and no multiple of four.
ROWS, COLUMNS, FRAMES = 6, 10, 3


def entry_name(name: str) -> str:
    """The catalogue's entry for a pipeline class."""
    return PIPELINES[name].vae_of(SimpleNamespace())


def tail_of(name: str, vae: Any, *, rows: int = ROWS, columns: int = COLUMNS) -> Tail:
    """A case for a class: what its layout asks for, then what is its own."""
    entry = VaeCatalog.load()[entry_name(name)]
    batch, channels = 2, entry.channels
    frames = FRAMES
    height, width = rows * entry.spatial, columns * entry.spatial
    num_frames = (frames - 1) * entry.temporal + 1
    token = channels * entry.patch_size**2
    tokens = rows * columns // entry.patch_size**2
    shape: tuple[int, ...] = {
        "unpacked": (batch, channels, rows, columns),
        "packed": (batch, tokens, token),
        "packed_frame": (batch, tokens, token),
        "video": (batch, channels, frames, rows, columns),
        "video_2d": (batch, channels, frames, rows, columns),
        "frames_2d": (batch, frames, channels, rows, columns),
        "frames_first": (batch, frames, channels, rows, columns),
        "channels_last": (batch, frames, rows, columns, channels),
        "channels_last_image": (batch, 1, rows, columns, channels),
        "packed_video": (batch, frames * rows * columns, channels),
    }[str(PIPELINES[name].layout)]
    known: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "self_vae_scale_factor": entry.spatial,
        "self_vae_scale_factor_spatial": entry.spatial,
        "self_vae_scale_factor_temporal": entry.temporal,
        "use_resolution_binning": False,
    }
    given: dict[str, Any] = {}
    if str(PIPELINES[name].layout).startswith("packed"):
        given = {"height": height, "width": width}
    if entry.resizes:  # a size that is none of the bins
        known |= {"use_resolution_binning": True, "orig_height": height - 12, "orig_width": width - 20}
        given = {"height": height - 12, "width": width - 20}
    tail = Tail(shape=shape, known=known, given=given)
    own = OWN.get(name)
    return tail if own is None else own(tail, vae)


# What single classes need beside that -----------------------------------------------------------------------


def with_known(**known: Any) -> Callable[[Tail, Any], Tail]:
    return lambda tail, _: replace(tail, known=tail.known | known)


def ltx(tail: Tail, vae: Any) -> Tail:
    own = {
        "latent_num_frames": FRAMES,
        "latent_height": ROWS,
        "latent_width": COLUMNS,
        "self_transformer_spatial_patch_size": 1,
        "self_transformer_temporal_patch_size": 1,
        "decode_timestep": 0.0,
        "decode_noise_scale": None,
    }
    given = {"num_frames": tail.known["num_frames"]} if len(tail.shape) == 3 else {}
    return replace(tail, known=tail.known | own, given=tail.given | given)


def cogvideox(tail: Tail, vae: Any) -> Tail:
    own = {"self_vae_scaling_factor_image": vae.config.scaling_factor, "additional_frames": 0}
    return replace(tail, known=tail.known | own)


OWN: dict[str, Callable[[Tail, Any], Tail]] = {
    "StableVideoDiffusionPipeline": with_known(needs_upcasting=False, num_frames=FRAMES, decode_chunk_size=FRAMES),
    "LTXConditionPipeline": ltx,
    "CogVideoXPipeline": cogvideox,
}
