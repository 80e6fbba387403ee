"""A pipeline that expects a VAE, on a machine that has none: its own `decode` goes through the queue.

`latentq up --vae demo` must run. For code that cannot be changed to `output_type="latent"`, such as the nodes of a
graph that hand a VAE around: give them a `QueuedVAE` instead. Each call waits for its picture; `overlap.py` does not.
"""

from __future__ import annotations

import sys
from importlib import resources
from typing import Any

import diffusers
import torch

from producer import DecodeClient, QueuedVAE


def main(prompt: str, path: str) -> None:
    folder = str(resources.files("producer") / "demo_pipeline")
    pipelines: Any = diffusers
    with DecodeClient.from_env() as client:
        # Of the VAE's own class, with its config, and without weights.
        vae = QueuedVAE("demo", client=client, wait_s=120)
        pipe = pipelines.StableDiffusionPipeline.from_pretrained(folder, vae=vae)
        picture = pipe(
            prompt,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    picture.save(path)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
