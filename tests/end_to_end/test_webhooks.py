"""`latentq up` with webhooks: a latent goes in, a signed message comes out, and its link opens the picture."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from urllib.parse import urlsplit

import requests
from PIL import Image
from safetensors.numpy import load_file

from producer import DecodeClient
from tests.support.receivers import SECRET, Receiver
from tests.support.up import latentq_up
from tests.support.wait import wait_until

ROOT = Path(__file__).parents[2]


def test_a_picture_reaches_the_receiver_as_a_link_that_needs_no_key(tmp_path: Path) -> None:
    webhooks = {
        "LATENTQ_PUBLIC_URL": "http://localhost",
        "LATENTQ_LINK_KEY": "k" * 32,
        "LATENTQ_WEBHOOK_ALLOW": "http://127.0.0.1:*",
    }
    (latents,) = load_file(ROOT / "worker/demo_vae/latents/coffee.safetensors").values()
    with Receiver() as receiver, latentq_up(tmp_path, vaes=["demo"], **webhooks) as up:
        client = DecodeClient.from_url(
            up.broker_url,
            public_url=webhooks["LATENTQ_PUBLIC_URL"],
            link_key=webhooks["LATENTQ_LINK_KEY"],
            webhook_allow=(webhooks["LATENTQ_WEBHOOK_ALLOW"],),
            _env_file=None,
        )
        with client:
            job = client.submit(latents, vae="demo", webhook=receiver.url, webhook_secret=SECRET)
            wait_until(lambda: receiver.received, timeout_s=60, what="the message")
            picture = job.image()
        (output,) = receiver.received[0].verified(SECRET)["data"]["outputs"]
        link = urlsplit(output["url"])
        assert link.netloc == "localhost"
        answer = requests.get(f"{up.url}{link.path}?{link.query}", timeout=30)
        assert answer.status_code == 200
        assert hashlib.sha256(answer.content).hexdigest() == output["sha256"]
        assert Image.open(io.BytesIO(answer.content)).tobytes() == picture.tobytes()
        tampered = requests.get(f"{up.url}{link.path}?{link.query}0", timeout=30)
        assert tampered.status_code in (401, 403)
