"""A VAE whose `decode` takes little memory, for callers that expect a VAE."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from worker.lowmem_decode.by_class import can_stream, decode, stream


class LowMemoryVae:
    """Stands in for a diffusers autoencoder; everything but `decode` is the module's own."""

    def __init__(self, module: Any, *, lean: bool = False) -> None:
        """Args:
        module: an autoencoder that `supports` knows.
        lean: recompute the last upsample convolution instead of keeping its output.
        """
        self._module = module
        self._lean = lean

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def decode(self, z: torch.Tensor, *, return_dict: bool, temb: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        """`(sample,)`, as `module.decode(z, return_dict=False)` gives it."""
        assert not return_dict
        return (decode(self._module, z, lean=self._lean, temb=temb),)

    @property
    def streams(self) -> bool:
        """Whether `stream` can be called."""
        return can_stream(self._module)

    def stream(self, z: torch.Tensor) -> Generator[torch.Tensor, None, None]:
        """What `decode` returns for one clip, (1, C, f, h, w), in groups of frames (1, 3, n, H, W)."""
        return stream(self._module, z)
