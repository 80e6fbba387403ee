"""Latents of a clip become an mp4, and one of its frames a picture, from the same latents.

`latentq up --vae demo` must run. With a pipeline for video the latents are
`pipe(prompt, output_type="latent").frames`, and `pipeline=pipe` says the rest.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from producer import DecodeClient


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    clip = Path(str(resources.files("worker") / "demo_vae" / "latents" / "clip.safetensors"))
    with DecodeClient.from_env() as client:
        job = client.submit_file(clip, vae="demo", fps=12)
        job.wait(timeout=120)
        (out / "clip.mp4").write_bytes(job.video())
        # The latents are still there: no second upload.
        stills = job.redecode(output="jpg")
        stills.wait(timeout=120)
        stills.images()[-1].save(out / "last-frame.jpg")
    for path in sorted(out.iterdir()):
        print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "video-output"))
