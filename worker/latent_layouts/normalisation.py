"""Undoing the training-time normalisation of latents, one function for each `LatentState`.

Elementwise, so that it may come before or after a change of layout; but each keeps its pipeline's operations and their
order, since `z / (1 / std)` and `z · std` round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from broker_config.errors import InvalidOption
from broker_config.latent_geometry import LatentState

#: pipeline_ernie_image.py `__call__` adds this, whatever `batch_norm_eps` says.
_ERNIE_EPS: Final = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """What undoes the normalisation of latents."""

    #: Latents were multiplied by it.
    scaling_factor: float
    #: Latents were shifted by it first; None: not at all.
    shift_factor: float | None
    #: Per-channel statistics (Playground 2.5, Wan, Qwen …), float32, (C,) or of Cosmos 1 (C·frames,); None: none.
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None
    #: Running statistics of a batch norm over 2×2 patches (FLUX.2), float32, (4·C,); None: none.
    bn_mean: torch.Tensor | None = None
    bn_var: torch.Tensor | None = None
    bn_eps: float = 0.0
    #: The scheduler's sigma_data; None: none.
    sigma_data: float | None = None


def scaling_of(
    vae: Any, *, scaling_factor: float | None, shift_factor: float | None, sigma_data: float | None = None
) -> Scaling:
    """Factors from the request, else from the VAE.

    Args:
        vae: a diffusers autoencoder.
        scaling_factor: the request's; None: the config's.
        shift_factor: the request's; None: the config's.
        sigma_data: the request's.

    Raises:
        InvalidOption: the request's factor contradicts a VAE that has statistics.
    """
    config = vae.config
    mean, std = _statistics(vae, "latents_mean"), _statistics(vae, "latents_std")
    own = float(config.get("scaling_factor") or 1.0)
    if scaling_factor is not None and mean is not None and scaling_factor != own:
        raise InvalidOption(
            f"scaling_factor is {scaling_factor}, but this VAE has latents_mean and latents_std with a scaling_factor "
            f"of {own}: leave it out",
            field="scaling_factor",
        )
    if shift_factor and mean is not None and std is not None:
        raise InvalidOption(
            f"shift_factor is {shift_factor}, but this VAE has latents_mean and latents_std instead: leave it out",
            field="shift_factor",
        )
    norm = getattr(vae, "bn", None)
    return Scaling(
        scaling_factor=own if scaling_factor is None else scaling_factor,
        shift_factor=config.get("shift_factor") if shift_factor is None else shift_factor,
        mean=mean if std is not None else None,
        std=std if mean is not None else None,
        bn_mean=None if norm is None else norm.running_mean,
        bn_var=None if norm is None else norm.running_var,
        bn_eps=float(config.get("batch_norm_eps") or 0.0),
        sigma_data=sigma_data,
    )


def denormalise(latents: torch.Tensor, scaling: Scaling, state: LatentState = LatentState.SCALED) -> torch.Tensor:
    """Latents as they came from the encoder.

    Args:
        latents: channels in dimension 1; for the states of a batch norm, 2×2 patches of them.
        scaling: what to undo.
        state: how.

    Raises:
        InvalidOption: the VAE lacks the statistics that `state` goes by.
    """
    return _STATES[state](latents, scaling)


def _scaled(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`z / scaling_factor + shift_factor`, or `z · std / scaling_factor + mean`.

    Sources: pipelines/stable_diffusion/pipeline_stable_diffusion.py `__call__` (z / sf); pipelines/flux/
    pipeline_flux.py `__call__` ((z / sf) + shift); pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py
    `__call__` (latents_mean, latents_std); pipelines/ltx/pipeline_ltx.py `_denormalize_latents`.
    """
    if scaling.mean is not None and scaling.std is not None:
        mean, std = like(scaling.mean, latents), like(scaling.std, latents)
        return latents * std / scaling.scaling_factor + mean
    latents = latents / scaling.scaling_factor
    # pipeline_flux adds the factor also where it is 0; adding 0 changes no bit but the sign of zero.
    return latents if scaling.shift_factor is None else latents + scaling.shift_factor


def _reciprocal(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`1 / scaling_factor · z`, which rounds differently from a division.

    Sources: pipelines/animatediff/pipeline_animatediff.py `decode_latents`; pipelines/cogvideo/pipeline_cogvideox.py
    `decode_latents`; pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py `decode_latents`.
    """
    return 1 / scaling.scaling_factor * latents


def _scaled_first(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`z / scaling_factor · std + mean`. Source: pipelines/sana_wm/pipeline_sana_wm.py `_decode_latents`."""
    mean, std = needed_statistics(latents, scaling)
    return latents / scaling.scaling_factor * std + mean


def _standardised(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`z · std + mean`.

    Sources: pipelines/glm_image/pipeline_glm_image.py `__call__`; pipelines/motif_video/pipeline_motif_video.py
    `_denormalize_latents`; pipelines/qwenimage21/pipeline_qwenimage21.py `__call__`.
    """
    mean, std = needed_statistics(latents, scaling)
    return latents * std + mean


def _standardised_inverse(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`z / (1 / std) + mean`.

    Sources: pipelines/wan/pipeline_wan.py `__call__`; pipelines/qwenimage/pipeline_qwenimage.py `__call__`.
    Sana-Video's third branch (a VAE without statistics) divides by one and adds zero.
    """
    if scaling.mean is None:
        return latents
    mean, std = needed_statistics(latents, scaling)
    return latents / (1.0 / std) + mean


def _sigma(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`z · std / sigma_data + mean`; without statistics `z / sigma_data`.

    Sources: pipelines/cosmos/pipeline_cosmos_text2world.py, pipeline_cosmos2_video2world.py `__call__`.
    """
    assert scaling.sigma_data is not None, "checked at submit"
    if scaling.mean is None:
        return latents / scaling.sigma_data
    mean, std = needed_statistics(latents, scaling)
    return latents * std / scaling.sigma_data + mean


def _sigma_inverse(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`z / (1 / std) / sigma_data + mean`. Source: pipelines/cosmos/pipeline_cosmos2_text2image.py `__call__`."""
    assert scaling.sigma_data is not None, "checked at submit"
    mean, std = needed_statistics(latents, scaling)
    return latents / (1.0 / std) / scaling.sigma_data + mean


def _batch_norm(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`z · sqrt(var + eps) + mean`. Source: pipelines/flux2/pipeline_flux2.py `__call__`."""
    mean, var = _batch_norm_of(scaling)
    std = torch.sqrt(var + scaling.bn_eps)
    return latents * like(std, latents) + like(mean, latents)


def _batch_norm_1e5(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """As `_batch_norm`, eps 1e-5. Source: pipelines/ernie_image/pipeline_ernie_image.py `__call__`."""
    mean, var = _batch_norm_of(scaling)
    return latents * like(torch.sqrt(var + _ERNIE_EPS), latents) + like(mean, latents)


def _batch_norm_inverse(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`z / (1 / sqrt(var + eps)) + mean`. Source: pipelines/bria_fibo2/pipeline_bria_fibo2.py `__call__`."""
    mean, var = _batch_norm_of(scaling)
    inverse = 1 / torch.sqrt(var + scaling.bn_eps)
    return latents / like(inverse, latents) + like(mean, latents)


def _denormalised(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """As they are. Sources: pipelines/flux2/pipeline_flux2_klein.py, pipelines/ltx2/pipeline_ltx2.py `__call__`."""
    return latents


_STATES: Final[Mapping[LatentState, Callable[[torch.Tensor, Scaling], torch.Tensor]]] = {
    LatentState.SCALED: _scaled,
    LatentState.RECIPROCAL: _reciprocal,
    LatentState.SCALED_FIRST: _scaled_first,
    LatentState.STANDARDISED: _standardised,
    LatentState.STANDARDISED_INVERSE: _standardised_inverse,
    LatentState.SIGMA: _sigma,
    LatentState.SIGMA_INVERSE: _sigma_inverse,
    LatentState.BATCH_NORM: _batch_norm,
    LatentState.BATCH_NORM_1E5: _batch_norm_1e5,
    LatentState.BATCH_NORM_INVERSE: _batch_norm_inverse,
    LatentState.DENORMALISED: _denormalised,
}


def _statistics(vae: Any, name: str) -> torch.Tensor | None:
    """Per-channel statistics from the config, or from a buffer of the module (LTX-Video), in float32 on the CPU."""
    values = vae.config.get(name)
    if values is not None:
        return torch.tensor(values)
    buffers: dict[str, torch.Tensor] = dict(vae.named_buffers(recurse=False))
    return buffers.get(name)


def needed_statistics(latents: torch.Tensor, scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std, shaped like `latents`.

    Raises:
        InvalidOption: the VAE has none.
    """
    if scaling.mean is None or scaling.std is None:
        raise InvalidOption(
            "state goes by latents_mean and latents_std, which this VAE's config lacks: check `state` and `vae`",
            field="state",
        )
    return like(scaling.mean, latents), like(scaling.std, latents)


def _batch_norm_of(scaling: Scaling) -> tuple[torch.Tensor, torch.Tensor]:
    if scaling.bn_mean is None or scaling.bn_var is None:
        raise InvalidOption("state goes by a batch norm, which this VAE lacks: check `state` and `vae`", field="state")
    return scaling.bn_mean, scaling.bn_var


def like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """(C,) → (1, C, 1, …), in the dtype and on the device of `latents`.

    Statistics of each latent frame (Cosmos 1), (C·frames,) → (1, C, f, 1, 1): those of the first f.
    Source: pipelines/cosmos/pipeline_cosmos_text2world.py `__call__`.
    """
    channels = latents.shape[1]
    if values.numel() != channels and latents.ndim == 5:
        values = values.view(1, channels, -1, 1, 1)[:, :, : latents.shape[2]]
    else:
        values = values.view((1, channels) + (1,) * (latents.ndim - 2))
    return values.to(latents.device, latents.dtype)
