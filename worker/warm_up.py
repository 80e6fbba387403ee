"""Makes a loaded VAE ready: one small decode, so that no job pays for kernels, workspaces and pages touched first; and,
where jobs may share a batch, the pixels worth putting into one call.

Nothing here may keep a worker from starting: a VAE that cannot be warmed up is decoded cold.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any, Final

import torch

from worker.decode_probes import CostModels
from worker.vae_pool import LoadedVae

logger = logging.getLogger(__name__)

#: Latent rows and columns of the first decode; every VAE takes them, tiled ones included.
_SIDE: Final = 8
#: Pixels of one call where nothing was measured: decode is compute-bound from 512² up (diffusers#1150: batches of 1,
#: 4, 8 and 16 at 512² take 0.085, 0.33, 0.65 and 1.29 s).
USUAL_BUDGET_PX: Final = 1_048_576
#: What a batch costs beside its decode: a claim (0.6 ms, benchmarks/results/queue_cost.json) and telling its stage.
_CALL_OVERHEAD_S: Final = 0.001


class WarmUp:
    """Warms VAEs up and knows their batch budgets."""

    def __init__(self, *, calibrate: bool) -> None:
        """Args:
        calibrate: measure how large a call is worth making; of no use where jobs never share a batch.
        """
        self._calibrate = calibrate
        self._models = CostModels()
        #: VAE → decoded pixels that are worth putting into one call.
        self.budgets_px: dict[str, int] = {}

    def run(self, vae: LoadedVae) -> None:
        """Decodes zeros once; measures, if that is wanted and the VAE takes pictures."""
        try:
            with vae.lock, torch.inference_mode():
                latents = smallest_latents(vae)
                _decode(vae.module, latents)
                if self._calibrate and latents.ndim == 4 and vae.entry.temporal == 1:
                    model = self._models.get(
                        vae.entry.name,
                        vae.module,
                        channels=latents.shape[1],
                        spatial=vae.entry.spatial,
                        device=vae.device,
                        dtype=vae.dtype,
                    )
                    self.budgets_px[vae.entry.name] = model.budget_px(overhead_s=_CALL_OVERHEAD_S)
        except Exception as error:
            logger.warning(
                "VAE %s was not warmed up: %s",
                vae.entry.name,
                error,
                extra={"action": "warm_up_failed", "vae": vae.entry.name},
            )
            return
        logger.info(
            "VAE %s is warm; one call takes up to %d pixels",
            vae.entry.name,
            self.budgets_px.get(vae.entry.name, USUAL_BUDGET_PX),
            extra={"action": "vae_warm", "vae": vae.entry.name},
        )


def smallest_latents(vae: LoadedVae) -> torch.Tensor:
    """Zeros as the module's own `decode` takes them: (1, C, 8, 8), or (1, C, 1, 8, 8) for a VAE of clips."""
    quant = getattr(vae.module, "post_quant_conv", None)
    first = quant if quant is not None else vae.module.decoder
    weight = next(parameter for parameter in first.parameters() if parameter.ndim >= 4)
    shape = (1, weight.shape[1], *(1,) * (weight.ndim - 4), _SIDE, _SIDE)
    return torch.zeros(shape, device=vae.device, dtype=vae.dtype)


def _decode(module: Any, latents: torch.Tensor) -> None:
    keywords: dict[str, Any] = {}
    if module.config.get("timestep_conditioning"):
        keywords["temb"] = torch.zeros(1, device=latents.device, dtype=latents.dtype)
    if "num_frames" in inspect.signature(module.decode).parameters:
        keywords["num_frames"] = 1
    module.decode(latents, return_dict=False, **keywords)
