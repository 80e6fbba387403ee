"""Hand latents over and forget them: another process, another day, asks for the picture by the job's id.

`latentq up --vae demo` must run. `python examples/fire_and_forget.py` prints an id;
`python examples/fire_and_forget.py ID picture.png` fetches the picture.
"""

from __future__ import annotations

import sys

import numpy as np

from broker_config.errors import BrokerUnreachable
from producer import DecodeClient


def hand_over() -> str:
    """Submits latents and returns the job's id. If the connection breaks, the same id cannot make a second job."""
    latents = np.random.default_rng(0).standard_normal((1, 16, 32, 32)).astype(np.float16)
    with DecodeClient.from_env() as client:
        try:
            return client.submit(latents, vae="demo").id
        except BrokerUnreachable as error:
            return client.submit(latents, vae="demo", job_id=error.job_id).id


def fetch(job_id: str, path: str) -> None:
    """Waits for the job and stores its picture."""
    with DecodeClient.from_env() as client:
        job = client.job(job_id)
        job.wait(timeout=60)
        job.image().save(path)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        fetch(sys.argv[1], sys.argv[2])
    else:
        print(hand_over())
