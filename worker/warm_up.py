"""Makes a loaded VAE ready: one small decode, so that no job pays for kernels, workspaces and pages touched first; and,
in mode fast, what the fast way needs, what decodes take here, and the pixels worth putting into one call.

Nothing here may keep a worker from starting: a VAE that cannot be warmed up is decoded cold.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any, Final

import torch

from broker_config.errors import OutOfMemory, WeightsMismatch, WeightsMissing, WorkerError
from broker_config.vae_catalog import VaeCatalog
from worker.decode_probes import CostModels, why_unmeasured
from worker.fast_path import FastVae, FastVaes
from worker.stages import classify
from worker.vae_pool import LoadedVae, VaePool, find_weights

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

    def __init__(
        self,
        *,
        calibrate: bool,
        costs: CostModels | None = None,
        fast: FastVaes | None = None,
        compile_sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Args:
        calibrate: measure what decodes take, for the planner and for the size of batches; of no use in mode exact,
            which has nothing to choose and whose jobs never share a batch.
        costs: where what was measured goes.
        fast: the fast ways to compile and to measure; None: none.
        compile_sizes: pictures to compile for, (width, height) in pixels.
        """
        self._calibrate = calibrate
        self._models = costs or CostModels()
        self._fast = fast
        self._compile_sizes = compile_sizes
        #: VAE → decoded pixels that are worth putting into one call.
        self.budgets_px: dict[str, int] = {}

    def load(self, names: Sequence[str], *, catalog: VaeCatalog, pool: VaePool) -> tuple[str, ...]:
        """Loads and warms as many as the pool holds. Returns those that can be served: they have usable weights here.

        One that there is no room for now is loaded when a job asks for it.

        Raises:
            WeightsMissing, WeightsMismatch: none can be served.
        """
        usable: list[str] = []
        errors: list[WorkerError] = []
        for name in names:
            try:
                find_weights(catalog[name])
                if not pool.is_full:
                    self.run(pool.get(name))
            except (WeightsMissing, WeightsMismatch) as error:
                errors.append(error)
                logger.error("VAE %s is not served: %s", name, error, extra={"action": "vae_not_served", "vae": name})
                continue
            except Exception as error:
                known = classify(error)
                if not isinstance(error, WorkerError) and not isinstance(known, OutOfMemory):
                    raise
                logger.warning(
                    "VAE %s is not loaded yet: %s", name, known, extra={"action": "warm_up_failed", "vae": name}
                )
            usable.append(name)
        if not usable:
            raise _why_none(errors)
        return tuple(usable)

    def run(self, vae: LoadedVae) -> None:
        """Decodes zeros once; measures, if that is wanted and the VAE takes latents alone."""
        try:
            with vae.lock, torch.inference_mode():
                latents = smallest_latents(vae)
                _decode(vae.module, latents)
                fast = self._make_fast(vae)
                if self._calibrate and why_unmeasured(vae) is None:
                    model = self._models.get(
                        vae.entry.name,
                        vae.module,
                        channels=latents.shape[1],
                        spatial=vae.entry.spatial,
                        device=vae.device,
                        dtype=vae.dtype,
                        fast=fast,
                    )
                    if latents.ndim == 4:
                        budget_px = model.budget_px(model.for_batches, overhead_s=_CALL_OVERHEAD_S)
                        self.budgets_px[vae.entry.name] = budget_px
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

    def _make_fast(self, vae: LoadedVae) -> FastVae | None:
        """The VAE's fast ways, decoded with once and compiled where they are to be."""
        fast = None if self._fast is None else self._fast.of(vae.module, half_suits=vae.half_suits)
        if self._fast is None or fast is None:
            return None
        _decode(fast.view, smallest_latents(vae).to(fast.dtype))
        spatial = vae.entry.spatial
        sides = [(height // spatial, width // spatial) for width, height in self._compile_sizes]
        graphs = self._fast.prepare(vae.module, fast, sides=sides)
        logger.info(
            "VAE %s in mode fast: %s, %s, %d norms fused by %s, %s",
            vae.entry.name,
            fast.memory_format,
            str(fast.dtype).removeprefix("torch."),
            fast.norms,
            fast.norms_by,
            f"{graphs} graphs compiled" if graphs else f"not compiled ({fast.why_not_compiled or 'it failed'})",
            extra={"action": "fast_path_ready", "vae": vae.entry.name},
        )
        return fast


def _why_none(errors: Sequence[WorkerError]) -> WorkerError:
    """One error for a worker that can serve none of its VAEs."""
    if len(errors) == 1:
        return errors[0]
    kind = WeightsMismatch if any(isinstance(error, WeightsMismatch) for error in errors) else WeightsMissing
    return kind("; ".join(error.message for error in errors) or "no VAE to serve: name one with --vae")


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
