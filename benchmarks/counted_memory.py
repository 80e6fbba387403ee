"""The memory of the largest decodes, counted instead of measured: `python -m benchmarks.counted_memory`.

Tensors are fake ones: nothing is computed and nothing allocated, so FLUX.1's 2048² needs neither a GPU nor an hour.
What is counted is what an allocator would hold: every storage that an operator makes, from then until it is freed. What
an operator takes for itself while it runs (workspaces of convolutions, blocks of scores in attention) is not. Each
figure is the peak above weights and latents, the picture included. A decode in strips takes minutes: it has many
operators.
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from collections.abc import Sequence
from typing import Any, Final
from unittest import mock

import diffusers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import write_result
from worker import lowmem_decode
from worker.bench_vaes import ARCHITECTURES, latents_of
from worker.decode_meter import decoder_of
from worker.decode_planner import DecodeMode
from worker.lowmem_decode import decoder

#: VAE, pixels of a side, dtype, and the bar in GB for the low-memory decode.
CASES: Final = (("sdxl", 1024, torch.float16, 0.9), ("flux", 2048, torch.bfloat16, 3.5))
_MODES: Final = (DecodeMode.PLAIN, DecodeMode.LOW_MEMORY, DecodeMode.LEAN)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside its block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = 0
        #: The most that lived at once.
        self.peak: int = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, torch.Tensor):
                self._known.add(given.untyped_storage())
        made = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self._now -= size


def counted(name: str, *, side: int, dtype: torch.dtype, mode: DecodeMode) -> tuple[int, int]:
    """The most bytes that live at once in one decode, and those of its largest activation."""
    made = ARCHITECTURES[name]
    with torch.device("meta"):
        vae = getattr(diffusers, made.kind)(**made.config).eval()
    vae.encoder = torch.nn.Identity()
    vae = vae.to_empty(device="cpu").to(dtype)  # real weights, which are not counted; the decoder takes no others
    # Looking whether there is room takes room at once, and is no part of the decode.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), mock.patch.object(decoder, "probe"):
        latents = latents_of(vae, name, side=side).to(dtype)
        with LiveBytes() as live:
            decoder_of(vae, mode)(latents)
    return int(live.peak), lowmem_decode.largest_bytes(vae, latents.shape, dtype)


def main(cases: Sequence[tuple[str, int, torch.dtype, float]] = CASES) -> list[dict[str, Any]]:
    """Counts everything and stores the figures."""
    rows: list[dict[str, Any]] = []
    for name, side, dtype, bar_gb in cases:
        for mode in _MODES:
            peak, largest = counted(name, side=side, dtype=dtype, mode=mode)
            row = {
                "vae": name,
                "side": side,
                "dtype": str(dtype).removeprefix("torch."),
                "mode": str(mode),
                "peak_bytes": peak,
                "largest_activation_bytes": largest,
                "ratio_to_largest": peak / largest,
                **({"bar_bytes": bar_gb * 1e9} if mode is DecodeMode.LOW_MEMORY else {}),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_result("counted_memory", {"decodes": rows})  # at once: the next figure takes minutes
    return rows


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
    sys.exit(0)
