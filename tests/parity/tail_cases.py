"""What the last lines of each pipeline class need to run without the rest: latents, sizes, and what is its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from broker_config.vae_catalog import VaeCatalog
from producer.pipeline_table import PIPELINES

#: Class without a whole pipeline → why it has none: it is held to its own last lines instead.
NOT_RUN_WHOLE: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Latents of a pipeline, and the variables its last lines read."""

    shape: tuple[int, ...]
    #: Variables of `__call__`, and with `self_` before them attributes of the pipeline.
    known: dict[str, Any] = field(default_factory=dict)
    #: What a caller says beside the pipeline.
    given: dict[str, Any] = field(default_factory=dict)
    #: What of the latents is handed out, where that is not all.
    handed_out: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
    #: What the last lines start from, where that is not what is handed out.
    variable: str = "latents"
    #: Whether the pipeline's own way to its latents and back rounds.
    rounds: bool = False


#: Rows and columns of latents: not square, and no multiple of four.
ROWS, COLUMNS, FRAMES = 6, 10, 3


def _load(name: str) -> Any:
    """A pipeline class; late, since the oldest of them warn of themselves."""
    return importlib.import_module("tests.parity.pipeline_tails").load(name)


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


def upsampled(tail: Tail, vae: Any) -> Tail:
    """Latents that are normalised only to be handed out: undoing that gives them back but for rounding."""
    undone = _load("LTXLatentUpsamplePipeline")._normalize_latents
    return replace(
        ltx(tail, vae),
        handed_out=lambda latents: undone(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor),
        rounds=True,
    )


def denormalised(kind: str) -> Callable[[Tail, Any], Tail]:
    """LTX-2 undoes the normalisation before it hands latents out, by a method of its own."""

    def case(tail: Tail, vae: Any) -> Tail:
        undo = _load(kind)._denormalize_latents
        silent = SimpleNamespace(dtype=torch.float32, decode=lambda audio, return_dict: (audio,))
        own = {
            "audio_latents": torch.zeros(1, 1),
            "public_audio": torch.zeros(1, 1),
            "self_audio_vae": silent,
            "self_vocoder": Vocoder(),
            "decode_timestep": 0.0,
            "decode_noise_scale": None,
            "requested_frames": tail.known["num_frames"],
            "canvas_frames": tail.known["num_frames"],
            "frame_rate": 24.0,
            "playback_fps": 24.0,
            "self_vae_temporal_compression_ratio": 8,
            "slot_latents": None,
            "carry_keyframes": None,
        }
        return replace(
            tail,
            known=tail.known | own,
            handed_out=lambda latents: undo(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor),
            variable="video_latents" if "DFR" in kind else "latents",
        )

    return case


class Vocoder:
    """Makes no sound of anything."""

    config = SimpleNamespace(output_sampling_rate=24_000)

    def __call__(self, spectrogram: torch.Tensor) -> torch.Tensor:
        return spectrogram


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


_LTX2 = (
    "LTX2DFRPipeline",
    "LTX2DFRTemporalRefinePipeline",
)
OWN: dict[str, Callable[[Tail, Any], Tail]] = {
    **{name: denormalised(name) for name in _LTX2},
    "StableVideoDiffusionPipeline": with_known(needs_upcasting=False, num_frames=FRAMES, decode_chunk_size=FRAMES),
    "LTXConditionPipeline": ltx,
    "LTX2LatentUpsamplePipeline": ltx,
    "CogVideoXPipeline": cogvideox,
    "LTXLatentUpsamplePipeline": upsampled,
    # The caller's own clip comes before what is decoded: here it is empty.
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": with_known(
        video_original=torch.zeros(2, 3, 0, ROWS * 8, COLUMNS * 8)
    ),
    "AnyFlowFARPipeline": with_known(permutation=(0, 2, 1, 3, 4)),
}
