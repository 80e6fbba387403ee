"""Latents of every kind with what must be said of them, for the ways there are to say it: command line and HTTP."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Of the form of a generator's state; the worker looks into it, the producer does not.
STATE = base64.urlsafe_b64encode(random.Random(5).randbytes(2600)).decode().rstrip("=")
_LTX = {"vae": "ltx", "layout": "packed_video", "height": 192, "width": 256, "num_frames": 9, "decode_timestep": 0.05}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Latents, and what is said of them."""

    shape: tuple[int, ...]
    said: Mapping[str, Any]


CASES: Mapping[str, Facts] = {
    "packed": Facts(
        shape=(1, 24, 64), said={"vae": "flux", "layout": "packed", "height": 64, "width": 96, "patch_size": 2}
    ),
    "layers": Facts(
        shape=(1, 36, 64),
        said={"vae": "qwen-image-layered", "layout": "layers", "height": 48, "width": 64, "layers": 2},
    ),
    "the scheduler's": Facts(shape=(1, 16, 2, 6, 8), said={"vae": "cosmos1", "sigma_data": 0.5}),
    "padded in front": Facts(shape=(1, 4, 16, 6, 8), said={"vae": "cogvideox-5b", "additional_frames": 1}),
    "in chunks": Facts(shape=(1, 16, 6, 6, 8), said={"vae": "helios", "layout": "video_chunks", "frames_per_call": 3}),
    "in tiles": Facts(
        shape=(1, 128, 2, 6, 8), said={"vae": "ltx", "layout": "video_blended", "blended_tiles": "2x3+1"}
    ),
    "with noise": Facts(shape=(1, 96, 128), said={**_LTX, "decode_noise_scale": 0.025, "seed": 2**64 - 1}),
    "with a generator": Facts(shape=(1, 96, 128), said={**_LTX, "noise_state": STATE}),
    "with another scale": Facts(
        shape=(1, 4, 3, 6, 8),
        said={
            "vae": "sd",
            "layout": "video_2d",
            "state": "scaled",
            "scaling_factor": 0.25,
            "shift_factor": 0.125,
            "allow_tiling": True,
        },
    ),
    "of one VAE": Facts(
        shape=(1, 4, 6, 8),
        said={
            "vae": "sd",
            "vae_class": "AutoencoderKL",
            "vae_config": "0123456789abcdef",
            "vae_revision": "31f26fdeee1355a5c34592e401dd41e45d25a493",
        },
    ),
}
