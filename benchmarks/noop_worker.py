"""A real worker whose VAE does nothing: what is left is the queue. `python -m benchmarks.noop_worker`."""

from __future__ import annotations

import sys
from typing import Any

import torch

from broker_config.connection import connect
from broker_config.logs import configure_logging
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog, VaeEntry
from worker.decode_worker import DecodeWorker
from worker.settings import load_worker_settings
from worker.vae_pool import LoadedVae

ENTRY = VaeEntry(
    name="noop",
    title="does nothing",
    weights="latentq:demo",
    vae_class="AutoencoderKL",
    dtype="float32",
    channels=4,
    spatial=8,
    layouts=("unpacked",),  # type: ignore[arg-type]
)


class NoopVae(torch.nn.Module):
    """Answers every decode with zeros of the right size."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"scaling_factor": 1.0, "block_out_channels": (1, 1)}

    def decode(self, latents: torch.Tensor, *, return_dict: bool) -> tuple[torch.Tensor]:
        """(B, C, h, w) → (B, 3, 8h, 8w)."""
        assert not return_dict
        batch, _, rows, columns = latents.shape
        return (torch.zeros(batch, 3, rows * 8, columns * 8),)


def main() -> int:
    """Serves the VAE `noop` until stopped; arguments: mode."""
    settings = load_settings()
    configure_logging(settings)
    catalog = VaeCatalog({**VaeCatalog.load(), "noop": ENTRY})
    own = load_worker_settings(vaes=("noop",), mode=sys.argv[1], threads=1)
    worker = DecodeWorker(connect(settings, name="noop"), settings=settings, worker_settings=own, catalog=catalog)
    vae = LoadedVae(
        entry=ENTRY,
        module=NoopVae(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights={"weights": "none"},
        size_bytes=0,
    )
    worker.pool.get = lambda name: vae  # type: ignore[method-assign]
    worker.install_signal_handlers()
    return worker.run()


if __name__ == "__main__":
    sys.exit(main())
