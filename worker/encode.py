"""Encode: pixels and a VAE in, latents out, as image-to-image pipelines make them. Knows nothing of queues.

The order of operations is the pipelines': what `VaeImageProcessor.preprocess` does, `vae.encode`, the mean of the
posterior or a sample of it, then the normalisation that `worker/latent_layouts` undoes, and the layout. Pixels that are
floats have been preprocessed already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from broker_config.errors import InvalidOption, InvalidSize
from broker_config.latent_geometry import LatentLayout, LatentState
from worker.latent_layouts import Plan, Scaling
from worker.latent_layouts.normalisation import like, needed_statistics


def encode_pixels(
    vae: Any, pixels: torch.Tensor, plan: Plan, *, seed: int | None, items_per_call: int | None = None
) -> torch.Tensor:
    """Latents of pictures or clips.

    Args:
        vae: a diffusers autoencoder.
        pixels: uint8, (B, H, W, 3) or (B, F, H, W, 3), or floats that `vae.encode` takes, (B, 3, H, W) or
            (B, 3, F, H, W), or for state `posterior` these with channels last, and with the strides of that; on any
            device.
        plan: layout and state of the latents to make.
        seed: of the CPU generator that the posterior is sampled with; None: its mean.
        items_per_call: pictures in one call of the VAE; None: all. Clips of uint8 are encoded one by one, as
            pipelines do; floats are what a caller would give to one `vae.encode`.

    Returns:
        Latents in the VAE's dtype, laid out as `plan.layout`; in state `posterior` what they are drawn from, with
        the channels that the VAE makes of it.

    Raises:
        InvalidOption: a state or a layout that no pipeline encodes to.
        InvalidSize: the pixels are not those of the plan.
    """
    _check_size(pixels, plan)
    with torch.inference_mode():
        pixels = pixels.to(vae.device)
        is_bytes = pixels.dtype == torch.uint8
        values = (to_vae_values(pixels) if is_bytes else _channels_first(pixels)).to(vae.dtype)
        step = 1 if plan.is_video and is_bytes else max(1, min(plan.batch, items_per_call or plan.batch))
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        if plan.latent_state is LatentState.POSTERIOR:
            return torch.cat([_parameters_of(vae.encode(part)) for part in torch.split(values, step)])
        parts = [_latents_of(vae.encode(part), generator) for part in torch.split(values, step)]
        latents = normalise(torch.cat(parts), plan.scaling, plan.latent_state)
        return _LAYOUTS[plan.layout](latents)


def _check_size(pixels: torch.Tensor, plan: Plan) -> None:
    sizes = (plan.num_frames, plan.height, plan.width) if plan.is_video else (plan.height, plan.width)
    last, first = (plan.batch, *sizes, 3), (plan.batch, 3, *sizes)
    if pixels.dtype == torch.uint8:
        right = [last]
    else:
        right = [first, last] if plan.latent_state is LatentState.POSTERIOR else [first]
    if tuple(pixels.shape) not in right:
        raise InvalidSize(f"pictures are {list(pixels.shape)}, the job says {list(right[0])}", field="pictures")


def _channels_first(values: torch.Tensor) -> torch.Tensor:
    """B, …, 3 → B, 3, …, a view; what has its channels first stays. No side of a picture is 3 pixels long."""
    return values.movedim(-1, 1) if values.shape[-1] == 3 != values.shape[1] else values


def to_vae_values(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) → float32 (B, 3, H, W), or (B, F, H, W, 3) → (B, 3, F, H, W), in [-1, 1].

    Source: image_processor.py `VaeImageProcessor.preprocess`: `pil_to_numpy` (x / 255), `normalize` (2·x - 1).
    """
    values = 2.0 * (pixels.to(torch.float32) / 255.0) - 1.0
    # B, H, W, 3 → B, 3, H, W; B, F, H, W, 3 → B, 3, F, H, W. Pictures keep the strides of channels last, as
    # `numpy_to_pt` leaves them, for which convolutions have other kernels; `preprocess_video` stacks its frames anew.
    values = values.movedim(-1, 1)
    return values.contiguous() if values.ndim == 5 else values


def normalise(latents: torch.Tensor, scaling: Scaling, state: LatentState) -> torch.Tensor:
    """What `denormalise` undoes.

    Raises:
        InvalidOption: no pipeline encodes to this state.
    """
    if state not in _STATES:
        raise InvalidOption(f"state is {state}, which no pipeline encodes to: {', '.join(_STATES)}", field="state")
    return _STATES[state](latents, scaling)


def _scaled(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`sf · z`, `(z - shift) · sf`, or `(z - mean) · sf / std`.

    Sources: pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py `_encode_vae_image`; pipelines/flux/
    pipeline_flux_img2img.py `_encode_vae_image`; pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl_img2img.py
    `prepare_latents`.
    """
    if scaling.mean is not None and scaling.std is not None:
        return (latents - like(scaling.mean, latents)) * scaling.scaling_factor / like(scaling.std, latents)
    if scaling.shift_factor is not None:
        return (latents - scaling.shift_factor) * scaling.scaling_factor
    return scaling.scaling_factor * latents


def _standardised(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`(z - mean) / std`. Source: pipelines/motif_video/pipeline_motif_video_image2video.py `_normalize_latents`."""
    mean, std = needed_statistics(latents, scaling)
    return (latents - mean) / std


def _standardised_inverse(latents: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """`(z - mean) · (1 / std)`. Source: pipelines/wan/pipeline_wan_video2video.py `prepare_latents`."""
    mean, std = needed_statistics(latents, scaling)
    return (latents - mean) * (1.0 / std)


_STATES: Final[Mapping[LatentState, Callable[[torch.Tensor, Scaling], torch.Tensor]]] = {
    LatentState.SCALED: _scaled,
    LatentState.RECIPROCAL: lambda latents, scaling: scaling.scaling_factor * latents,
    LatentState.STANDARDISED: _standardised,
    LatentState.STANDARDISED_INVERSE: _standardised_inverse,
    LatentState.DENORMALISED: lambda latents, scaling: latents,
}


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) → (B, (h/2)·(w/2), 4·C): 2×2 patches in raster order.

    Source: pipelines/flux/pipeline_flux.py `FluxPipeline._pack_latents`.
    """
    batch, channels, rows, columns = latents.shape
    latents = latents.view(batch, channels, rows // 2, 2, columns // 2, 2)  # B, C, h/2, 2, w/2, 2
    latents = latents.permute(0, 2, 4, 1, 3, 5)  # B, h/2, w/2, C, 2, 2
    return latents.reshape(batch, (rows // 2) * (columns // 2), channels * 4)


#: Layouts that can be encoded to; `pixel_input.ENCODABLE` names the same.
_LAYOUTS: Final[Mapping[LatentLayout, Callable[[torch.Tensor], torch.Tensor]]] = {
    LatentLayout.UNPACKED: lambda latents: latents,
    LatentLayout.PACKED: pack,
    LatentLayout.VIDEO: lambda latents: latents,
}


def _latents_of(encoded: Any, generator: torch.Generator | None) -> torch.Tensor:
    """A sample of the posterior, or its mean; of a VAE without one (TAESD, DC-AE) what it made.

    Source: pipelines/stable_diffusion/pipeline_stable_diffusion_img2img.py `retrieve_latents`.
    """
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        made: torch.Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return made
    drawn: torch.Tensor = posterior.mode() if generator is None else posterior.sample(generator)
    return drawn


def _parameters_of(encoded: Any) -> torch.Tensor:
    """What the posterior is made of, mean and log variance; of a VAE without one (TAESD, DC-AE) what it made."""
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        return _latents_of(encoded, None)
    parameters: torch.Tensor = posterior.parameters
    return parameters
