"""Memory of one decode of a known size: by arithmetic in low memory, by bytes a pixel in the other ways.

The planner's lines are of pictures. What a clip holds is no line: it may come off the device in pieces, and how it is
cut depends on its frames, rows and columns.
"""

from __future__ import annotations

from typing import Any, Final
from weakref import WeakKeyDictionary

import torch

from broker_config.latent_geometry import FrameRule, LatentLayout
from broker_config.messages import DecodeRequest, Kind
from broker_config.vae_catalog import VaeEntry
from worker import lowmem_decode
from worker.decode import FOLDED, folded_at_once
from worker.decode_planner import FAST_MODES, DecodeMode
from worker.frame_stream import frames_at_once
from worker.vae_pool import LoadedVae

#: Layouts whose last two dimensions are rows and columns of what the VAE decodes.
_ROWS_LAST: Final = frozenset({LatentLayout.VIDEO, LatentLayout.VIDEO_CHUNKS})
#: Sizes of one VAE that are remembered.
_REMEMBERED: Final = 256


class DecodeMemory:
    """Bytes above the weights that decodes hold. For one thread."""

    def __init__(self) -> None:
        #: Arithmetic walks through the whole decoder, which takes as long as a small decode.
        self._low: WeakKeyDictionary[Any, dict[tuple[Any, ...], dict[DecodeMode, int]]] = WeakKeyDictionary()
        self._supported: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def has_low_memory(self, module: Any) -> bool:
        """Whether there is a low-memory decoder for a VAE."""
        if module not in self._supported:
            self._supported[module] = lowmem_decode.supports(module) is None
        return self._supported[module]

    def of_item(
        self, vae: LoadedVae, *, height: int, width: int, num_frames: int, bytes_per_px: float
    ) -> dict[DecodeMode, int]:
        """What one picture or clip takes in each way there is.

        Args:
            vae: the VAE.
            height: of the picture, in pixels.
            width: likewise.
            num_frames: of the clip; 1 for a picture.
            bytes_per_px: working memory of plain decode for a pixel that is an activation.
        """
        at_once = bytes_per_px * height * width * frames_at_once(vae.module, num_frames)
        result = 3 * num_frames * height * width * vae.dtype.itemsize
        plain = int(at_once + result)
        found = dict.fromkeys((DecodeMode.PLAIN, *FAST_MODES), plain)
        return found | self.in_low_memory(vae, height=height, width=width, num_frames=num_frames)

    def in_low_memory(self, vae: LoadedVae, *, height: int, width: int, num_frames: int) -> dict[DecodeMode, int]:
        """The same of the low-memory ways alone; empty where there are none."""
        if not self.has_low_memory(vae.module):
            return {}
        shape = latents_shape(vae, height=height, width=width, num_frames=num_frames)
        known = self._low.setdefault(vae.module, {})
        if (shape, vae.dtype) not in known:
            if len(known) >= _REMEMBERED:
                known.clear()
            known[shape, vae.dtype] = {
                mode: lowmem_decode.working_bytes(vae.module, shape, vae.dtype, lean=mode is DecodeMode.LEAN)
                for mode in (DecodeMode.LOW_MEMORY, DecodeMode.LEAN)
            }
        return known[shape, vae.dtype]


def latents_shape(vae: LoadedVae, *, height: int, width: int, num_frames: int) -> tuple[int, ...]:
    """Latents, as `decode` of the module takes them, that become a picture or clip of this size."""
    entry = vae.entry
    rows, columns = (-(-side // entry.spatial) for side in (height, width))
    if not takes_clips(vae.module):
        return (1, entry.channels, rows, columns)
    return (1, entry.channels, _latent_frames(entry, num_frames), rows, columns)


def takes_clips(module: Any) -> bool:
    """Whether latents have frames: the decoder begins with a convolution over them."""
    quant = getattr(module, "post_quant_conv", None)
    first = quant if isinstance(quant, torch.nn.Module) else getattr(module, "decoder", None)
    if first is None:  # ConsistencyDecoderVAE
        return False
    return next((parameter.ndim for parameter in first.parameters() if parameter.ndim >= 4), 4) == 5


def decoded_size(vae: LoadedVae, request: DecodeRequest) -> tuple[int, int, int]:
    """(height, width, frames) that one call of the VAE makes of an item: not always the job's, whose pictures may be
    resized, and whose frames may come of several calls."""
    height, width, frames = request.height, request.width, request.num_frames
    if request.kind is Kind.ENCODE:
        return height, width, frames
    if len(request.shape) == 5 and request.layout in _ROWS_LAST:
        height, width = request.shape[3] * vae.entry.spatial, request.shape[4] * vae.entry.spatial
    each = request.facts.frames_per_call
    if request.layout in FOLDED:
        frames = min(frames, folded_at_once(request.layout, frames, asked=each))
    if request.layout == LatentLayout.VIDEO_CHUNKS and each is not None:
        frames = min(frames, (each - 1) * vae.entry.temporal + 1)
    return height, width, frames


def _latent_frames(entry: VaeEntry, num_frames: int) -> int:
    if entry.frames is FrameRule.FIRST_ALONE:
        return (num_frames - 1) // entry.temporal + 1
    return -(-num_frames // entry.temporal)
