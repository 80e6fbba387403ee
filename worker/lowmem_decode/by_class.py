"""Low-memory decode by a VAE's class: its norms are over whole activations (`decoder`) or pixels (`pixel_norm`)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch

from worker.lowmem_decode import decoder, pixel_norm
from worker.lowmem_decode.decoder import OnProgress
from worker.lowmem_decode.structure import UnsupportedStructure


def supports(module: Any) -> str | None:
    """Why `module` cannot be decoded here; None if it can."""
    if not pixel_norm.knows(module):
        return decoder.supports(module)
    try:
        pixel_norm.read(module, only_shapes=True)
    except UnsupportedStructure as error:
        return str(error)
    return None


def decode(
    module: Any,
    z: torch.Tensor,
    *,
    lean: bool = False,
    strip_rows: int | None = None,
    temb: torch.Tensor | None = None,
    on_progress: OnProgress | None = None,
) -> torch.Tensor:
    """What `module.decode(z).sample` returns untiled, in a fraction of the memory.

    Args:
        module: an autoencoder that `supports` knows, as diffusers loaded it.
        z: (B, C, h, w), or (B, C, f, h, w) for a VAE of clips, denormalised, on the module's device and of its dtype.
        lean: store even less, at the price of computing it again; a VAE with norms per pixel stores nothing anyway.
        strip_rows: rows of a strip at every resolution; None: by size.
        temb: the timesteps, (B), where the VAE is conditioned on one.
        on_progress: told the part of the work that is done, from 0 to 1, after every strip.

    Returns:
        (B, 3, H, W) or (B, 3, F, H, W), contiguous, of the module's dtype.

    Raises:
        UnsupportedStructure: the module is not understood; `supports` says so beforehand.
        ValueError: latents of another dtype, device or shape.
        RuntimeError: out of memory; on a CPU with a limit of its address space before anything is run.
    """
    if pixel_norm.knows(module):
        return pixel_norm.decode(module, z, strip_rows=strip_rows, temb=temb, on_progress=on_progress)
    return decoder.decode(module, z, lean=lean, strip_rows=strip_rows, on_progress=on_progress)


def can_stream(module: Any) -> bool:
    """Whether `stream` knows this VAE."""
    return pixel_norm.knows(module) and not module.config.get("timestep_conditioning", False)


def stream(module: Any, z: torch.Tensor) -> Generator[torch.Tensor, None, None]:
    """What `decode(module, z)` returns for one clip, (1, C, f, h, w), in groups of frames (1, 3, n, H, W)."""
    return pixel_norm.stream(module, z)


def working_bytes(module: Any, shape: Sequence[int], dtype: torch.dtype, *, lean: bool = False) -> int:
    """Memory a decode takes above the weights and the latents, by arithmetic: the picture, and the most held for it.

    Args:
        module: as in `decode`.
        shape: of the latents.
        dtype: of latents and weights.
        lean: as in `decode`.
    """
    if pixel_norm.knows(module):
        return pixel_norm.working_bytes(module, shape, dtype)
    return decoder.working_bytes(module, shape, dtype, lean=lean)


def largest_bytes(module: Any, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the largest activation of one item of these latents, as the VAE's own decode makes it."""
    if pixel_norm.knows(module):
        return pixel_norm.largest_bytes(module, shape, dtype)
    return decoder.largest_bytes(module, shape, dtype)
