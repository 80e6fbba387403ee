"""Denoise the next prompt while the last one is decoded: submit and go on, take results as they finish.

`latentq up --vae demo` must run. The loop stands in for a diffusion pipeline; with a real one, `denoise` is
`pipe(prompt, output_type="latent").images` on a pipeline loaded with `vae=None`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from producer import DecodeClient, JobFailed

PROMPTS = ["a lighthouse at dusk", "a fox in the snow", "an old map"]


def denoise(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    """Latents of one prompt: (1, 16, 32, 32), what the demo VAE decodes to 256 × 256."""
    return np.random.default_rng(seed).standard_normal((1, 16, 32, 32)).astype(np.float16)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with DecodeClient.from_env() as client:
        jobs = {}
        for seed, prompt in enumerate(PROMPTS):
            # Returns in milliseconds: the latents are safe, and this GPU goes straight to the next prompt.
            job = client.submit(denoise(seed), vae="demo", metadata={"prompt": prompt, "seed": str(seed)})
            jobs[job.id] = prompt
        for job in client.as_completed([client.job(job_id) for job_id in jobs], timeout=120):
            try:
                path = out / f"{jobs[job.id].replace(' ', '-')}.png"
                job.image().save(path)
                print(path)
            except JobFailed as error:
                print(error, file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "overlap-output"))
