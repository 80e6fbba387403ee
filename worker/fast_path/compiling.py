"""A decoder compiled by `torch.compile` for the sizes it was prepared for; every other size runs as it is.

A graph takes ten seconds and more to compile, so that happens while a VAE is warmed up, never for a job: one graph for
each size that was named, and one with free sizes where the family takes it. What the compiler wrote stays in a folder
from one process to the next (`keep_compiled_in`), so that the next start takes a fraction.

A size whose graph cannot be compiled, or does not run, is decoded as it is: that is said once, in the log.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

logger = logging.getLogger(__name__)

Graph = Callable[[torch.Tensor], torch.Tensor]

#: Times one graph may be compiled again: torch takes a size of 1, and what kernels want aligned, for constants.
_RECOMPILES: Final = 2


def keep_compiled_in(folder: Path) -> None:
    """Where the compiler keeps what it wrote; what the environment says already stays. Call it before anything runs.

    Source: torch/_inductor/runtime/cache_dir_utils.py, triton/runtime/cache.py.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


class CompiledDecoder(nn.Module):
    """Stands where the decoder stood."""

    def __init__(self, decoder: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> None:
        """Args:
        decoder: of a view; called with latents alone.
        backend: of `torch.compile`.
        """
        super().__init__()
        self.decoder = decoder
        self._backend = backend
        #: (items, rows, columns) of latents and their dtype → the graph for them.
        self._graphs: dict[tuple[int, int, int, torch.dtype], Graph] = {}
        #: Graphs of one item of any size.
        self._free: dict[torch.dtype, Graph] = {}

    @property
    def is_prepared(self) -> bool:
        """Whether there is a graph at all."""
        return bool(self._graphs or self._free)

    def has_graph_for(self, height: int, width: int, dtype: torch.dtype) -> bool:
        """Whether one latent of so many rows and columns is decoded compiled."""
        return self._graph_for(1, height, width, dtype) is not None

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of (B, C, h, w)."""
        graph = self._graph_for(*_size(z))
        out: torch.Tensor = self.decoder(z) if graph is None else graph(z)
        return out

    def prepare(self, z: torch.Tensor, *, free_sizes: bool = False) -> bool:
        """Compiles for latents like `z`, by decoding them. Returns whether that worked.

        Args:
            z: as `forward` takes it.
            free_sizes: one graph for every height and width instead, of one item a call.

        Raises:
            OutOfMemoryError: there is no room for the decode itself.
        """
        graph = torch.compile(self.decoder, dynamic=free_sizes, backend=self._backend, **_bounds())
        try:
            graph(z)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler fails in its own ways, and each is one more reason to go without
            logger.warning(
                "not compiled for %s: %s: %s",
                "any size" if free_sizes else tuple(z.shape),
                type(error).__name__,
                str(error).strip().splitlines()[0][:300] if str(error).strip() else "",
                extra={"action": "compile_failed"},
            )
            return False
        if free_sizes:
            self._free[z.dtype] = graph
        else:
            self._graphs[_size(z)] = graph
        return True

    def _graph_for(self, items: int, height: int, width: int, dtype: torch.dtype) -> Graph | None:
        named = self._graphs.get((items, height, width, dtype))
        return named if named is not None or items != 1 else self._free.get(dtype)


def _size(z: torch.Tensor) -> tuple[int, int, int, torch.dtype]:
    return z.shape[0], z.shape[2], z.shape[3], z.dtype


def _bounds() -> dict[str, Any]:
    """Options of torch.compile that bound how often a graph is compiled again, where this torch has them."""
    known = inspect.signature(torch.compile).parameters
    wanted = {"recompile_limit": _RECOMPILES, "isolate_recompiles": True}
    return {name: value for name, value in wanted.items() if name in known}
