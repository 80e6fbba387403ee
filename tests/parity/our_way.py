"""From a caller's latents and pipeline to what a worker makes of them, without a queue between."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from broker_config.messages import DecodeRequest
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from broker_config.vae_identity import config_digest
from producer.decode_options import DecodeOptions
from producer.pipelines import options_of
from producer.submission import build_request
from producer.tensor_input import to_tensor_file
from tests.parity.tail_cases import Tail
from worker.batch_decode import plan_of
from worker.decode import clip_frames, join_chunks, to_pixels
from worker.latent_io import read_latents
from worker.numerical_safety import finite_chunks
from worker.vae_pool import LoadedVae


def our_way(name: str, vae: Any, latents: torch.Tensor, tail: Tail) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """From a caller's latents and pipeline to what a worker makes of them: the tensor, and the pixels."""
    catalog, settings = VaeCatalog.load(), load_settings(_env_file=None)
    parts = {key[5:]: value for key, value in tail.known.items() if key.startswith("self_")}
    pipeline = type(name, (SimpleNamespace,), {})(**parts, vae=vae)
    options = options_of(pipeline, tail.given, catalog=catalog)
    assert options["vae_class"] == type(vae).__name__
    tensor = to_tensor_file(latents, max_bytes=settings.max_latents_bytes)
    request = build_request(tensor, DecodeOptions(**options), catalog=catalog, settings=settings)
    return decode(request, vae, read_latents(tensor.data, shape=request.shape, dtype=request.dtype))


def decode(request: DecodeRequest, vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """What `worker.batch_decode` does with a job of its own, given the latents as they arrive."""
    loaded = LoadedVae(
        entry=VaeCatalog.load()[request.vae],
        module=vae,
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights={"class": type(vae).__name__, "config": config_digest(vae.config)},
        size_bytes=0,
    )
    assert DecodeRequest.from_wire(request.to_wire()) == request, "every fact survives the wire"
    plan = plan_of(request, loaded, batch=request.batch)
    chunks = list(finite_chunks(vae, latents, plan))
    frames = torch.cat([to_pixels(clip_frames(chunk, plan), plan) for chunk in chunks]).numpy()
    if request.is_video:
        frames = frames.reshape(request.batch, request.num_frames, *frames.shape[1:])
    whole = join_chunks(chunks, plan)
    assert whole.shape[-2:] == (request.height, request.width), "what was measured at submit is what comes out"
    assert whole.shape[0] == request.batch
    return whole, frames
