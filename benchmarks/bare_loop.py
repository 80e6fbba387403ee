"""The baseline: decode then encode in a loop, no queue. A process of its own: `python -m benchmarks.bare_loop`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from worker.image_encoding import encode_image


def main() -> None:
    """Prints `{"seconds": …, "jobs": …}` for `--jobs` latents of `--side` px with the VAE in `--weights`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--channels", type=int, required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    autoencoder: Any = AutoencoderKL
    vae = autoencoder.from_pretrained(str(arguments.weights), low_cpu_mem_usage=False).eval()
    processor = VaeImageProcessor()
    latents = torch.randn(1, arguments.channels, arguments.side // 8, arguments.side // 8)

    def one() -> None:
        with torch.inference_mode():
            decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        pixels = (processor.postprocess(decoded, output_type="np")[0] * 255).round().astype("uint8")
        encode_image(pixels, output="png", metadata={}, provenance=None)

    one()
    started = time.perf_counter()
    for _ in range(arguments.jobs):
        one()
    print(json.dumps({"seconds": time.perf_counter() - started, "jobs": arguments.jobs}))


if __name__ == "__main__":
    main()
