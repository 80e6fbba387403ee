"""A caller's pictures, PIL, numpy or torch, to a checked request that makes latents of them.

The other half of `submission.py`, with the same rule: what can be refused is refused before anything is sent. Pictures
are uint8 with channels last, 0 to 255, or floats with channels first, which `vae.encode` gets as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from broker_config.errors import InvalidDtype, InvalidOption, InvalidRank, InvalidSize, UnknownLayout
from broker_config.latent_geometry import LAYOUTS, Geometry, LatentLayout, LatentState, checked_facts
from broker_config.messages import DecodeRequest, Kind, Output
from broker_config.settings import Settings
from broker_config.tensor_header import itemsize
from broker_config.vae_catalog import VaeCatalog, VaeEntry
from producer.decode_options import DecodeOptions
from producer.option_checks import check_pixels, checked_options, checked_state
from producer.submission import request_of
from producer.tensor_input import TensorFile, check_bytes, to_tensor_file

if TYPE_CHECKING:
    import torch

    #: A picture, pictures, or frames; see `DecodeClient.encode`.
    Pictures = Image.Image | Sequence[Image.Image] | np.ndarray[Any, Any] | torch.Tensor | TensorFile
else:
    Pictures = Any

#: Layouts that pictures can be encoded to.
ENCODABLE: Final = (LatentLayout.UNPACKED, LatentLayout.PACKED, LatentLayout.VIDEO)
#: Normalisations that pipelines apply when they encode.
_STATES: Final = (
    LatentState.SCALED,
    LatentState.RECIPROCAL,
    LatentState.STANDARDISED,
    LatentState.STANDARDISED_INVERSE,
)
#: What the VAE makes, as it is; where a caller asks for it.
_AS_IS: Final = (LatentState.DENORMALISED, LatentState.POSTERIOR)
#: What messages call them.
NAME: Final = "pictures"
#: What of `DecodeOptions` an encode takes.
ENCODE_OPTIONS: Final = frozenset(
    {
        "vae",
        "layout",
        "state",
        "seed",
        "scaling_factor",
        "shift_factor",
        "vae_class",
        "vae_config",
        "vae_revision",
        "mode",
        "priority",
        "timeout_s",
        "start_within_s",
        "retention_s",
        "webhook",
        "webhook_events",
        "webhook_inline",
        "webhook_secret",
        "metadata",
        "allow_tiling",
        "job_id",
    }
)
#: What of a pipeline's row an encode goes by: its other options are of the pipeline's decode.
OF_PIPELINE: Final = frozenset({"vae", "layout", "state", "vae_class", "vae_config", "vae_revision"})


def to_pixel_file(pictures: Pictures, *, max_bytes: int) -> TensorFile:
    """Pictures as a file: uint8 (n, H, W, 3) of PIL images, arrays and tensors in the shape they have.

    Raises:
        InvalidOption: neither PIL, numpy nor torch, or nothing.
        InvalidDtype: neither uint8 in numpy, nor one of the floats.
        InvalidSize: pictures of several sizes.
        LatentsTooLarge: more than `max_bytes`.
    """
    if isinstance(pictures, TensorFile):
        check_bytes(math.prod(pictures.shape) * itemsize(pictures.dtype), max_bytes=max_bytes, name=NAME)
        return pictures
    if isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8:
        return _as_file(pictures, max_bytes=max_bytes)
    if not isinstance(pictures, Image.Image | Sequence):
        try:
            return to_tensor_file(pictures, max_bytes=max_bytes, name=NAME)
        except InvalidDtype as error:
            raise InvalidDtype(f"{error.message}, or give uint8 in numpy, channels last", field=NAME) from None
        except InvalidOption as error:
            raise InvalidOption(
                "pictures are neither PIL images nor a numpy array or torch tensor", field=NAME
            ) from error
    images = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not images or not all(isinstance(item, Image.Image) for item in images):
        raise InvalidOption("pictures are neither PIL images nor a numpy array or torch tensor", field=NAME)
    sizes = {item.size for item in images}
    if len(sizes) > 1:
        raise InvalidSize(f"pictures have sizes {sorted(sizes)}: encode each size by itself", field=NAME)
    return _as_file(np.stack([np.asarray(item.convert("RGB")) for item in images]), max_bytes=max_bytes)


def _as_file(pixels: npt.NDArray[np.uint8], *, max_bytes: int) -> TensorFile:
    check_bytes(pixels.nbytes, max_bytes=max_bytes, name=NAME)

    def raw() -> memoryview:
        return np.ascontiguousarray(pixels).reshape(-1).data

    return TensorFile(dtype="uint8", shape=pixels.shape, raw=raw, name=NAME)


def build_encode_request(
    pictures: Pictures, options: DecodeOptions, *, catalog: VaeCatalog, settings: Settings
) -> tuple[DecodeRequest, TensorFile]:
    """The request for these pictures and their bytes, or the reason why not.

    Raises:
        InvalidJob: one of its subclasses, naming the field and the fix.
    """
    entry = catalog[options.vae]
    layout = _layout(entry, options.layout, options.state)
    state = checked_state(options, entry, layout)
    as_is = options.state in _AS_IS
    if state not in _STATES and not as_is:
        raise InvalidOption(
            f"{entry.name}'s latents are {state}, which no pipeline encodes to: name a `state` of "
            f"{', '.join((*_STATES, *_AS_IS))}",
            field="state",
        )
    file = to_pixel_file(pictures, max_bytes=settings.max_latents_bytes)
    rank = 5 if LAYOUTS[layout].is_video else 4
    if file.dtype == "uint8" and len(file.shape) == rank - 1:
        file = file.in_shape((1, *file.shape))  # one picture, or the frames of one clip
    geometry = _measure(file, entry, layout, is_last=channels_are_last(file, state), state=state)
    check_pixels(geometry, settings)
    facts = checked_facts(
        {name: getattr(options, name) for name in ("seed", "vae_class", "vae_config", "vae_revision")}
    )
    checked = checked_options(
        dataclasses.replace(options, output=str(Output.TENSOR)), entry=entry, geometry=geometry, settings=settings
    )
    request = request_of(
        file,
        facts | checked,
        options=options,
        entry=entry,
        layout=layout,
        state=state,
        geometry=geometry,
        kind=Kind.ENCODE,
    )
    return request, file


def _layout(entry: VaeEntry, wanted: str | None, state: str | None) -> LatentLayout:
    """The layout to encode to: the one named, else the entry's first that can be.

    Raises:
        UnknownLayout: not one of the entry's, or not one that can be encoded to.
    """
    if wanted == LatentLayout.UNPACKED and LatentLayout.PACKED in entry.layouts:
        return LatentLayout.UNPACKED  # what is packed otherwise
    if wanted is not None and entry.layout(wanted, state=state) in ENCODABLE:
        return entry.layout(wanted, state=state)
    fitting = [item for item in entry.layouts if item in ENCODABLE]
    if wanted is not None or not fitting:
        raise UnknownLayout(
            f"{entry.name} cannot be encoded to {wanted or ', '.join(entry.layouts)}; there are "
            f"{', '.join(fitting or ENCODABLE)}",
            field="layout",
        )
    return fitting[0]


def _measure(file: TensorFile, entry: VaeEntry, layout: LatentLayout, *, is_last: bool, state: LatentState) -> Geometry:
    """Sizes of the pictures, if the VAE can divide them."""
    is_video = LAYOUTS[layout].is_video
    sizes = "frames, height, width" if is_video else "height, width"
    form = f"(batch, {sizes}, 3)" if is_last else f"(batch, 3, {sizes})"
    shape = file.shape
    if len(shape) != form.count(",") + 1 or shape[-1 if is_last else 1] != 3:
        raise InvalidRank(
            f"pictures are {file.dtype} {list(shape)}, {entry.name} takes {form}: uint8 has its channels last, "
            "floats have them first",
            field="pictures",
        )
    if not is_last:
        shape = (shape[0], *shape[2:], 3)
    if any(size < 1 for size in shape):
        raise InvalidSize(f"pictures {list(shape)} have an empty dimension", field="pictures")
    batch, num_frames = shape[0], shape[1] if is_video else 1
    height, width = shape[-3], shape[-2]
    side = entry.spatial * (2 if layout is LatentLayout.PACKED else 1)
    for name, size in (("height", height), ("width", width)):
        if size % side:
            raise InvalidSize(
                f"{name} is {size}, {entry.name} takes multiples of {side}: resize the pictures", field=name
            )
    # on the way to a posterior a caller has the VAE's own input: of how many frames, it knows best itself
    if state is not LatentState.POSTERIOR and (num_frames - 1) % entry.temporal:
        raise InvalidSize(
            f"there are {num_frames} frames, {entry.name} takes 1 and multiples of {entry.temporal} more",
            field="num_frames",
        )
    return Geometry(batch=batch, num_frames=num_frames, height=height, width=width, is_video=is_video)


def channels_are_last(file: TensorFile, state: LatentState) -> bool:
    """Whether pictures have their channels in the last dimension: as uint8, and where it fits, on the way to a
    posterior: who asks for that has a VAE's own input, which may have these strides. Elsewhere it is a mistake.
    """
    shape = file.shape
    fits = len(shape) > 1 and shape[-1] == 3 != shape[1]
    return file.dtype == "uint8" or (state is LatentState.POSTERIOR and fits)


def encode_options(options: dict[str, Any]) -> dict[str, Any]:
    """`options`, if an encode takes all of them.

    Raises:
        InvalidOption: one that it does not.
    """
    unknown = sorted(set(options) - ENCODE_OPTIONS)
    if unknown:
        raise InvalidOption(
            f"{unknown[0]} is not an option of an encode; there are {', '.join(sorted(ENCODE_OPTIONS))}",
            field=unknown[0],
        )
    return options
