"""What diffusers itself makes of a pipeline with the demo VAE in it, in this process."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from tests.support.processes import ROOT


def demo_vae() -> Any:
    """The VAE that ships with latentq, as diffusers loads it."""
    autoencoder: Any = AutoencoderKL
    return autoencoder.from_pretrained(ROOT / "worker" / "demo_vae", torch_dtype=torch.float32)


def in_process(pipeline: Any, prompt: str, *, seed: int, **call: Any) -> np.ndarray[Any, Any]:
    """The picture (H, W, 3) that `pipeline` would have returned with the demo VAE."""
    whole = copy.copy(pipeline)
    whole.vae = demo_vae()
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.inference_mode():
        pictures = whole(prompt, generator=generator, output_type="pil", **call).images
    return np.asarray(pictures[0])
