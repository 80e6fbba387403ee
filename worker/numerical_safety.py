"""No black pictures: what a VAE makes is checked for NaN and Inf before its pixels are handed on.

In half precision some VAEs overflow on some latents (SDXL's original one in float16). Such a decode goes on in float32,
from the piece that was not finite; what is still not finite then fails the job.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final

import torch

from broker_config.errors import NonFiniteOutput
from worker.decode import decode_chunks
from worker.in_parts import in_parts
from worker.latent_layouts import Plan

logger = logging.getLogger(__name__)

#: What overflows in half precision, or loses too much of it.
_HALF: Final = (torch.float16, torch.bfloat16)


def finite_chunks(
    vae: Any,
    latents: torch.Tensor,
    plan: Plan,
    *,
    items_per_call: int | None = None,
    by_frames: bool = False,
    on_upcast: Callable[[int], None] = lambda _: None,
) -> Generator[torch.Tensor, None, None]:
    """What `decode_chunks` yields, every number of it finite.

    DESIGN. While this runs, nobody else may use the VAE: its weights change their dtype and change it back, also when
    the caller closes the iterator early.

    Args:
        vae: a diffusers autoencoder.
        latents: as for `decode_chunks`.
        plan: likewise.
        items_per_call: likewise.
        by_frames: likewise.
        on_upcast: told before the first piece that is decoded in float32; how many came before it.

    Raises:
        NonFiniteOutput: not finite in float32 either.
    """
    done = 0
    for chunk in decode_chunks(vae, latents, plan, items_per_call=items_per_call, by_frames=by_frames):
        if not is_finite(chunk):
            break
        yield chunk
        done += 1
    else:
        return
    del chunk
    if vae.dtype not in _HALF:
        raise _not_finite(done, ("float32",))
    narrow = str(vae.dtype).removeprefix("torch.")
    logger.warning("piece %d is not finite in %s, decoding in float32", done, narrow, extra={"action": "upcast"})
    on_upcast(done)
    # the inner one ends first: weights go back outside its inference mode
    with (
        widened(vae),
        contextlib.closing(
            decode_chunks(vae, latents, plan, items_per_call=items_per_call, by_frames=by_frames, first=done)
        ) as again,
    ):
        for number, wide in enumerate(again, start=done):
            if not is_finite(wide):
                raise _not_finite(number, (narrow, "float32"))
            yield wide


def is_finite(chunk: torch.Tensor) -> bool:
    """Whether no number is NaN or Inf."""
    with torch.inference_mode():
        frames = chunk.movedim(2, 0) if chunk.ndim == 5 else chunk
        return bool(torch.stack([torch.isfinite(part).all() for part in in_parts(frames)]).all())


@contextlib.contextmanager
def widened(vae: Any) -> Iterator[None]:
    """The VAE's weights as float32 for a block, then as they were: widening loses nothing, so the bits come back."""
    tensors = [t for t in itertools.chain(vae.parameters(), vae.buffers()) if t.dtype in _HALF]
    dtypes = [t.dtype for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        _narrow(list(zip(tensors, dtypes, strict=True)))


def _narrow(pairs: Sequence[tuple[torch.Tensor, torch.dtype]]) -> None:
    """Each tensor in its dtype. Each that is narrowed makes room: those for which there was none are tried again.

    Raises:
        RuntimeError: no room for one of them, with all others narrowed.
    """
    left: list[tuple[torch.Tensor, torch.dtype]] = []
    failure: RuntimeError | None = None
    for tensor, dtype in pairs:
        try:
            tensor.data = tensor.data.to(dtype)
        except RuntimeError as error:  # out of memory
            left.append((tensor, dtype))
            failure = error
    if failure is not None:
        if len(left) == len(pairs):
            raise failure
        _narrow(left)


def _not_finite(number: int, dtypes: tuple[str, ...]) -> NonFiniteOutput:
    return NonFiniteOutput(
        f"piece {number} of the decoded tensor has NaN or Inf in {' and in '.join(dtypes)}: check that the latents "
        "belong to this VAE, and its weights",
    )
