"""Latent layouts as pure functions: what a pipeline hands out → what its VAE's `decode` takes.

Each function follows the lines of the diffusers pipeline it names, in the same order of operations, so that
float32 results are equal bit for bit. Shapes: B batch, C latent channels, F frames, f latent frames,
h × w latent size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from broker_config.latent_geometry import LatentLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """What undoes the training-time normalisation of latents."""

    #: Latents were multiplied by it.
    scaling_factor: float
    #: Latents were shifted by it first; None: not at all.
    shift_factor: float | None
    #: Per-channel statistics (Playground 2.5, Wan, Qwen …); None: none.
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def scaling_of(config: Any, *, scaling_factor: float | None, shift_factor: float | None) -> Scaling:
    """Factors from the request, else from the VAE's config.

    Args:
        config: the VAE's `config`.
        scaling_factor: the request's; None: the config's.
        shift_factor: the request's; None: the config's.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    return Scaling(
        scaling_factor=float(config.get("scaling_factor") or 1.0) if scaling_factor is None else scaling_factor,
        shift_factor=config.get("shift_factor") if shift_factor is None else shift_factor,
        mean=tuple(mean) if mean is not None and std is not None else None,
        std=tuple(std) if mean is not None and std is not None else None,
    )


def denormalise(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """Undoes scaling: `z / scaling_factor + shift_factor`, or `z · std / scaling_factor + mean`.

    Sources: pipelines/stable_diffusion/pipeline_stable_diffusion.py `__call__` (z / sf); pipelines/flux/
    pipeline_flux.py `__call__` ((z / sf) + shift); pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py
    `__call__` (latents_mean, latents_std).
    """
    if scaling.mean is not None and scaling.std is not None:
        per_channel = (1, len(scaling.mean)) + (1,) * (latents.ndim - 2)
        mean = torch.tensor(scaling.mean).view(per_channel).to(latents.device, latents.dtype)
        std = torch.tensor(scaling.std).view(per_channel).to(latents.device, latents.dtype)
        return latents * std / scaling.scaling_factor + mean
    latents = latents / scaling.scaling_factor
    # pipeline_flux adds the factor also where it is 0; adding 0 changes no bit but the sign of zero.
    return latents if scaling.shift_factor is None else latents + scaling.shift_factor


def unpack(latents: torch.Tensor, *, height: int, width: int, spatial: int) -> torch.Tensor:
    """Packed 2×2 patches back to an image of latents.

    Args:
        latents: (B, (h/2)·(w/2), 4·C).
        height: of the decoded picture, px.
        width: of the decoded picture, px.
        spatial: px per latent px.

    Returns:
        (B, C, h, w).

    Source: pipelines/flux/pipeline_flux.py `FluxPipeline._unpack_latents`.
    """
    batch, _, packed = latents.shape
    rows, columns = height // (spatial * 2), width // (spatial * 2)
    latents = latents.view(batch, rows, columns, packed // 4, 2, 2)  # B, h/2, w/2, C, 2, 2
    latents = latents.permute(0, 3, 1, 4, 2, 5)  # B, C, h/2, 2, w/2, 2
    return latents.reshape(batch, packed // 4, rows * 2, columns * 2)  # B, C, h, w


def fold_frames(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, F, h, w) → (B·F, C, h, w), for image VAEs that decode frame by frame.

    Source: pipelines/animatediff/pipeline_animatediff.py `decode_latents`.
    """
    batch, channels, frames, rows, columns = latents.shape
    # B, C, F, h, w → B, F, C, h, w → B·F, C, h, w
    return latents.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, rows, columns)


def to_vae_input(
    latents: torch.Tensor, *, layout: LatentLayout, scaling: Scaling, height: int, width: int, spatial: int
) -> torch.Tensor:
    """Latents as `vae.decode` takes them: unpacked, then denormalised.

    Args:
        latents: in the VAE's dtype, on its device, laid out as `layout`.
        layout: how they are laid out.
        scaling: what to undo.
        height: of the decoded picture, px.
        width: of the decoded picture, px.
        spatial: px per latent px.

    Returns:
        (B, C, h, w) for image VAEs, frames folded into the batch; (B, C, f, h, w) for video VAEs.
    """
    if layout is LatentLayout.PACKED:
        latents = unpack(latents, height=height, width=width, spatial=spatial)
    if layout is LatentLayout.VIDEO_2D:
        # AnimateDiff multiplies by the reciprocal, which rounds differently from a division.
        return fold_frames(1 / scaling.scaling_factor * latents)
    return denormalise(latents, scaling)
