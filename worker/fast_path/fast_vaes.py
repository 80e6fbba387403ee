"""The fast ways of loaded VAEs: made when first asked for, kept as long as the VAE is.

DESIGN. Any thread may ask. Who decodes, or prepares, holds the VAE's lock, as for the VAE itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from worker.fast_path.compiling import CompiledDecoder
from worker.fast_path.families import (
    Family,
    FastOptions,
    family_of,
    memory_format_of,
    why_not_compiled,
)
from worker.fast_path.native_bfloat16 import fast_dtype, native_bfloat16
from worker.fast_path.norm_silu import GroupNormSiLU, triton_kernels
from worker.fast_path.view import fused_norms, refusal, view_of

logger = logging.getLogger(__name__)

#: Latent rows and columns of the decode that a graph of free sizes is compiled by: unlike each other, and no powers of
#: two, so that nothing is taken for a constant.
_FREE_SIZE = (40, 56)


@dataclass(frozen=True, kw_only=True, slots=True)
class FastVae:
    """One VAE's fast ways."""

    #: The autoencoder to call: other memory format, fused norms.
    view: Any
    #: The same with a compiled decoder; None where it is not to be compiled.
    compiled: Any | None
    #: Why not; None if it is.
    why_not_compiled: str | None
    dtype: torch.dtype
    #: Name, as families.toml has it.
    memory_format: str
    #: Norms that are one with their SiLU, and what runs them: `triton` or `torch`.
    norms: int
    norms_by: str
    evidence: str

    @property
    def is_compiled(self) -> bool:
        """Whether any size was compiled."""
        return self.compiled is not None and self.compiled.decoder.is_prepared

    def compiles(self, height: int, width: int) -> bool:
        """Whether one latent of so many rows and columns is decoded by a compiled graph."""
        return self.compiled is not None and self.compiled.decoder.has_graph_for(height, width, self.dtype)

    def module(self, *, compiled: bool) -> Any:
        """What to call `decode` of."""
        return self.compiled if compiled and self.compiled is not None else self.view

    def facts(self, *, compiled: bool) -> dict[str, object]:
        """What a result records of it."""
        return {
            "memory_format": "the compiler's" if compiled else self.memory_format,
            "fused_norms": "the compiler" if compiled else self.norms_by,
            "compiled": compiled,
        }


class FastVaes:
    """Fast ways by VAE."""

    def __init__(
        self,
        options: FastOptions | None = None,
        *,
        instructions: Callable[[], str | None] = native_bfloat16,
        backend: str | Callable[..., Any] = "inductor",
    ) -> None:
        """Args:
        options: the user's.
        instructions: tells how the CPU multiplies bfloat16.
        backend: of `torch.compile`.
        """
        self._options = options or FastOptions()
        self._instructions = instructions
        self._backend = backend
        self._lock = threading.Lock()
        self._made: WeakKeyDictionary[Any, FastVae] = WeakKeyDictionary()

    def of(self, module: Any, *, half_suits: bool = True) -> FastVae | None:
        """The fast ways of a loaded VAE; None if it has none (`why_not`).

        Args:
            module: the VAE.
            half_suits: whether it may be decoded in half precision, and nobody asked for another dtype.
        """
        if self.why_not(module) is not None:
            return None
        with self._lock:
            made = self._made.get(module)
            if made is None:
                made = self._made[module] = self._make(module, half_suits=half_suits)
            return made

    def why_not(self, module: Any) -> str | None:
        """Why a VAE has no fast way; None if it has. Asked each time: a VAE may be changed after it was loaded."""
        return "the fast way is off" if self._options.use == "off" else refusal(module)

    def prepare(self, module: Any, fast: FastVae, *, sides: Sequence[tuple[int, int]], others: bool = True) -> int:
        """Compiles for latents of these sizes, (height, width); with `others`, for any other if the family takes that.

        Returns how many graphs were made; a size too large for the device has none. The caller holds the VAE's lock.
        """
        family = family_of(module)
        if fast.compiled is None or family is None:
            return 0
        conv = next(part for part in fast.view.decoder.modules() if isinstance(part, nn.Conv2d))
        wanted = [(side, False) for side in sides] + ([(_FREE_SIZE, True)] if others and family.dynamic else [])
        made = 0
        with torch.inference_mode():
            for side, free_sizes in wanted:
                try:
                    z = torch.zeros(1, conv.in_channels, *side, device=module.device, dtype=fast.dtype)
                    made += fast.compiled.decoder.prepare(z, free_sizes=free_sizes)
                except torch.OutOfMemoryError:
                    logger.warning("no room to compile for %s", side, extra={"action": "compile_failed"})
        return made

    def _make(self, module: Any, *, half_suits: bool) -> FastVae:
        family = family_of(module)
        assert family is not None, "refused otherwise"
        options, device = self._options, module.device
        dtype = fast_dtype(
            module.dtype,
            device=device,
            half_suits=half_suits and options.native_bfloat16,
            instructions=self._instructions(),
        )
        clips = any(isinstance(part, nn.Conv3d) for part in module.decoder.modules())
        memory_format = memory_format_of(family, options, device=device, clips=clips)
        kernels = triton_kernels(device) is not None
        view = view_of(module, memory_format="contiguous", dtype=dtype)
        grouped = any(isinstance(part, GroupNormSiLU) for part in view.decoder.modules())
        if device.type == "cuda" and grouped and not kernels:
            memory_format = "contiguous"  # torch's own group norm would copy there and back each time
        if memory_format != "contiguous":
            view = view_of(module, memory_format=memory_format, dtype=dtype)
        why_not = why_not_compiled(family, options, device) or _not_compilable(clips=clips)
        return FastVae(
            view=view,
            compiled=None if why_not else self._compiled(module, dtype),
            why_not_compiled=why_not,
            dtype=dtype,
            memory_format=memory_format,
            norms=fused_norms(view),
            norms_by="triton" if kernels else "torch",
            evidence=family.evidence,
        )

    def _compiled(self, module: Any, dtype: torch.dtype) -> Any:
        """A view of its own: the compiler chooses memory formats and fuses norms itself."""
        view = view_of(module, memory_format="contiguous", dtype=dtype)
        view.decoder = CompiledDecoder(view.decoder, backend=self._backend)
        return view


def _not_compilable(*, clips: bool) -> str | None:
    """VAEs of clips are decoded in groups of frames that hand a cache on: other arguments than latents."""
    return "compiled for VAEs of pictures only" if clips else None


def describe(family: Family | None, fast: FastVae | None, why_not: str | None) -> dict[str, Any]:
    """What a plan says of the fast way."""
    if fast is None or family is None:
        return {"available": False, "why_not": why_not}
    return {
        "available": True,
        "memory_format": fast.memory_format,
        "dtype": str(fast.dtype).removeprefix("torch."),
        "fused_norms": fast.norms,
        "fused_norms_by": fast.norms_by,
        "compiled": fast.compiled is not None,
        "why_not_compiled": fast.why_not_compiled,
        "evidence": fast.evidence,
    }
