"""Decode: latents and a VAE in, pixels out. Knows nothing of queues.

The order of operations is the pipelines': cast to the VAE's dtype, undo the layout and the scaling, decode
under `inference_mode`, then what `VaeImageProcessor.postprocess` / `VideoProcessor.postprocess_video` do,
which is run on the device so that only uint8 crosses to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from broker_config.latent_geometry import LatentLayout
from worker.latent_layouts import Scaling, to_vae_input

#: Frames an image VAE decodes in one call (pipeline_animatediff.py `__call__`, decode_chunk_size=16).
FRAMES_PER_CALL: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How latents of one shape are decoded."""

    layout: LatentLayout
    scaling: Scaling
    #: Pictures or clips.
    batch: int
    #: Frames of each clip; 1 for pictures.
    num_frames: int
    #: Pixels.
    height: int
    width: int
    #: Pixels per latent pixel.
    spatial: int
    is_video: bool


def decode_chunks(
    vae: Any,
    latents: torch.Tensor,
    plan: Plan,
    *,
    items_per_call: int | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[torch.Tensor]:
    """The VAE's own output, in pieces, each as soon as the device has it.

    Args:
        vae: a diffusers autoencoder.
        latents: on any device, float, laid out as `plan.layout`.
        plan: sizes and scaling.
        items_per_call: pictures or clips in one call of the VAE (of an image VAE: at most 16 of the clips' frames);
            None: as many as the pipeline takes. Fewer need less memory and may differ from the pipeline in last bits.
        decode: takes what `vae.decode` takes and returns its sample; None: `vae.decode` itself.

    Yields:
        Pictures: (n, 3, H, W), all B at once unless `items_per_call` is smaller. Clips of a video VAE:
        (n, 3, F, H, W). Clips of an image VAE: (n, 3, H, W), n ≤ 16 frames of the folded batch, in order.
    """
    with torch.inference_mode():
        latents = latents.to(device=vae.device, dtype=vae.dtype)
        vae_input = to_vae_input(
            latents,
            layout=plan.layout,
            scaling=plan.scaling,
            height=plan.height,
            width=plan.width,
            spatial=plan.spatial,
        )
        step = plan.batch if items_per_call is None else min(plan.batch, items_per_call)
        if plan.layout is LatentLayout.VIDEO_2D:  # the clips' frames are folded into the batch
            step = min(FRAMES_PER_CALL, step * plan.num_frames)
        for start in range(0, vae_input.shape[0], step):
            part = vae_input[start : start + step]
            yield vae.decode(part, return_dict=False)[0] if decode is None else decode(part)


def join_chunks(chunks: list[torch.Tensor], plan: Plan) -> torch.Tensor:
    """The chunks as the tensor the pipeline returns for `output_type="pt"` before postprocessing.

    Returns:
        (B, 3, H, W) for pictures, (B, 3, F, H, W) for clips.

    Source for folded frames: pipeline_animatediff.py `decode_latents` (float32, whatever the VAE's dtype).
    """
    whole = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
    if plan.layout is LatentLayout.VIDEO_2D:
        # B·F, 3, H, W → B, F, 3, H, W → B, 3, F, H, W
        return whole.reshape(plan.batch, plan.num_frames, *whole.shape[1:]).permute(0, 2, 1, 3, 4).float()
    return whole


def to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """Decoded floats to uint8 pixels, on their device.

    Args:
        decoded: (…, 3, H, W) in [-1, 1], any float dtype.

    Returns:
        (…, H, W, 3) uint8: the values PIL images of the pipeline have.

    Source: image_processor.py `VaeImageProcessor.postprocess`, `denormalize` ((x·0.5 + 0.5) clamped to [0, 1], in
    the VAE's dtype), `pt_to_numpy` (to float32), `numpy_to_pil` ((x·255) rounded half to even).
    """
    with torch.inference_mode():
        unit = (decoded * 0.5 + 0.5).clamp(0, 1)
        return unit.float().mul(255).round().to(torch.uint8).movedim(-3, -1)


def clip_frames(chunk: torch.Tensor, plan: Plan) -> torch.Tensor:
    """A chunk of a clip as frames in order: (n, 3, H, W), the clips of a batch one after the other."""
    if plan.layout is LatentLayout.VIDEO_2D or not plan.is_video:
        return chunk
    # B, 3, F, H, W → B, F, 3, H, W → B·F, 3, H, W
    return chunk.transpose(1, 2).flatten(0, 1)
