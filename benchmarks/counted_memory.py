"""The memory of the largest decodes, counted instead of measured: `python -m benchmarks.counted_memory`.

Tensors are fake ones: nothing is computed and nothing allocated, so FLUX.1's 2048² needs neither a GPU nor an hour.
What is counted is what an allocator would hold: every storage that an operator makes, from then until it is freed. What
an operator takes for itself while it runs (workspaces of convolutions, blocks of scores in attention) is not. Each
figure is the peak above weights and latents, the picture included. A decode in strips takes minutes: it has many
operators.
"""

from __future__ import annotations

import argparse
import contextlib
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
from worker.lowmem_decode.pixel_norm import clip_decode

#: VAE, pixels of a side, frames, dtype, and the bar in GB for the low-memory decode, where one was set.
CASES: Final = (
    ("sdxl", 1024, 1, torch.float16, 0.9),
    ("flux", 2048, 1, torch.bfloat16, 3.5),
    ("qwen-image", 1024, 1, torch.bfloat16, None),
    ("wan", 480, 17, torch.bfloat16, None),
    ("hunyuan-video-1.5", 480, 17, torch.bfloat16, None),
    ("ltx", 480, 49, torch.bfloat16, None),
    ("hunyuan-video", 480, 17, torch.bfloat16, None),
    ("mochi", 480, 37, torch.bfloat16, None),
    ("cogvideox", 480, 9, torch.bfloat16, None),
)
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
            if not isinstance(tensor, torch.Tensor):
                continue
            if operator.is_view:  # of a real weight, whose storage only seems to be another one
                self._known.add(tensor.untyped_storage())
            else:
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


def counted(name: str, *, side: int, dtype: torch.dtype, mode: DecodeMode, frames: int = 1) -> tuple[int, int]:
    """The most bytes that live at once in one decode, and those of its largest activation."""
    made = ARCHITECTURES[name]
    with torch.device("meta"):
        vae = getattr(diffusers, made.kind)(**made.config).eval()
    vae.encoder = torch.nn.Identity()
    vae = vae.to_empty(device="cpu").to(dtype)  # real weights, which are not counted; the decoder takes no others
    # Looking whether there is room takes room at once, and is no part of the decode.
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        for module in (decoder, clip_decode):
            stack.enter_context(mock.patch.object(module, "probe"))
        latents = latents_of(vae, name, side=side, frames=frames).to(dtype)
        with LiveBytes() as live:
            decoder_of(vae, mode)(latents)
    return int(live.peak), lowmem_decode.largest_bytes(vae, latents.shape, dtype)


def main(cases: Sequence[tuple[str, int, int, torch.dtype, float | None]] = CASES) -> list[dict[str, Any]]:
    """Counts everything and stores the figures."""
    rows: list[dict[str, Any]] = []
    for name, side, frames, dtype, bar_gb in cases:
        for mode in _MODES:
            peak, largest = counted(name, side=side, frames=frames, dtype=dtype, mode=mode)
            row = {
                "vae": name,
                "side": side,
                "frames": frames,
                "dtype": str(dtype).removeprefix("torch."),
                "mode": str(mode),
                "peak_bytes": peak,
                "largest_activation_bytes": largest,
                "ratio_to_largest": peak / largest,
                **({} if bar_gb is None or mode is not DecodeMode.LOW_MEMORY else {"bar_bytes": bar_gb * 1e9}),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_result("counted_memory", {"decodes": rows})  # at once: the next figure takes minutes
    return rows


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
    sys.exit(0)
