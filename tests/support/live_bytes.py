"""The most bytes of tensors that live at once while something runs, counted operator by operator.

With fake tensors nothing is computed and nothing allocated, so sizes can be those of the largest pictures and clips.
What is counted is what an allocator would hold: every storage that an operator makes, from then until it is freed. What
an operator takes for itself while it runs (workspaces of convolutions, blocks of scores in attention) is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside its block."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0
        self.peak = 0
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


def live_bytes(
    make: Callable[[], Any], shape: tuple[int, ...], *, dtype: torch.dtype, decode: Callable[..., Any]
) -> int:
    """The peak of `decode(vae, latents)` above weights and latents, for the VAE that `make` makes."""
    with torch.device("meta"):
        vae = make().eval()
    del vae.encoder
    vae = vae.to_empty(device="cpu").to(dtype)  # the weights are real ones, which are not counted
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        latents = torch.empty(shape, dtype=dtype)
        with LiveBytes() as counted:
            decode(vae, latents)
    return counted.peak
