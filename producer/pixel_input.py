"""A caller's pictures, PIL or numpy, to a checked request that makes latents of them.

The other half of `submission.py`, with the same rule: what can be refused is refused before anything is sent.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from broker_config.blob_store import draft
from broker_config.errors import InvalidDtype, InvalidOption, InvalidRank, InvalidSize, LatentsTooLarge, UnknownLayout
from broker_config.latent_geometry import LAYOUTS, Geometry, LatentLayout, LatentState, checked_facts
from broker_config.messages import DecodeRequest, Kind, Output
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog, VaeEntry
from producer.submission import DecodeOptions, check_pixels, checked_options, checked_state, new_job_id
from producer.tensor_input import TensorFile

#: A picture, pictures, or frames; see `DecodeClient.encode`.
Pictures = Image.Image | Sequence[Image.Image] | npt.NDArray[np.uint8]
#: Layouts that pictures can be encoded to.
ENCODABLE: Final = (LatentLayout.UNPACKED, LatentLayout.PACKED, LatentLayout.VIDEO)
#: Normalisations that pipelines apply when they encode.
_STATES: Final = (
    LatentState.SCALED,
    LatentState.RECIPROCAL,
    LatentState.STANDARDISED,
    LatentState.STANDARDISED_INVERSE,
)
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
        "metadata",
        "allow_tiling",
        "job_id",
    }
)


def to_pixel_array(pictures: Pictures) -> npt.NDArray[np.uint8]:
    """Pictures as one uint8 array (n, H, W, 3), or as it is where it is an array already.

    Raises:
        InvalidOption: neither PIL nor numpy, or nothing.
        InvalidDtype: another dtype than uint8.
        InvalidSize: pictures of several sizes.
    """
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if isinstance(pictures, np.ndarray):
        if pictures.dtype != np.uint8:
            raise InvalidDtype(f"pictures are {pictures.dtype}, expected uint8: 0 to 255", field="pictures")
        return pictures
    if (
        not isinstance(pictures, Sequence)
        or not pictures
        or not all(isinstance(item, Image.Image) for item in pictures)
    ):
        raise InvalidOption("pictures are neither PIL images nor a numpy array of uint8", field="pictures")
    sizes = {item.size for item in pictures}
    if len(sizes) > 1:
        raise InvalidSize(f"pictures have sizes {sorted(sizes)}: encode each size by itself", field="pictures")
    return np.stack([np.asarray(item.convert("RGB")) for item in pictures])


def build_encode_request(
    pictures: Pictures, options: DecodeOptions, *, catalog: VaeCatalog, settings: Settings
) -> tuple[DecodeRequest, TensorFile]:
    """The request for these pictures and their bytes, or the reason why not.

    Raises:
        InvalidJob: one of its subclasses, naming the field and the fix.
    """
    entry = catalog[options.vae]
    layout = _layout(entry, options.layout)
    state = checked_state(options, entry, layout)
    if state not in _STATES:
        raise InvalidOption(
            f"{entry.name}'s latents are {state}, which no pipeline encodes to: name a `state` of {', '.join(_STATES)}",
            field="state",
        )
    pixels = to_pixel_array(pictures)
    if LAYOUTS[layout].is_video and pixels.ndim == 4:
        pixels = pixels[None]  # one clip
    elif pixels.ndim == 3:
        pixels = pixels[None]  # one picture
    geometry = _measure(pixels.shape, entry, layout)
    check_pixels(geometry, settings)
    if pixels.nbytes > settings.max_latents_bytes:
        raise LatentsTooLarge(
            f"the pictures have {pixels.nbytes} bytes, at most {settings.max_latents_bytes} are taken "
            "(LATENTQ_MAX_LATENTS_BYTES)",
            field="pictures",
        )
    dense = np.ascontiguousarray(pixels)
    file = TensorFile(dtype="uint8", shape=dense.shape, raw=lambda: dense.reshape(-1).data)
    facts = checked_facts(
        {name: getattr(options, name) for name in ("seed", "vae_class", "vae_config", "vae_revision")}
    )
    checked = checked_options(
        dataclasses.replace(options, output=str(Output.TENSOR)), entry=entry, geometry=geometry, settings=settings
    )
    job_id = options.job_id or new_job_id()
    request = DecodeRequest(
        job_id=job_id,
        vae=entry.name,
        layout=layout,
        latents=draft(f"{job_id}.in.{hashlib.sha256(file.data).hexdigest()[:16]}", file.data),
        shape=file.shape,
        dtype=file.dtype,
        height=geometry.height,
        width=geometry.width,
        batch=geometry.batch,
        num_frames=geometry.num_frames,
        state=None if state is LAYOUTS[layout].state else str(state),
        kind=Kind.ENCODE,
        **facts,
        **checked,
    )
    return dataclasses.replace(request, schema_version=request.needed_version), file


def _layout(entry: VaeEntry, wanted: str | None) -> LatentLayout:
    """The layout to encode to: the one named, else the entry's first that can be.

    Raises:
        UnknownLayout: not one of the entry's, or not one that can be encoded to.
    """
    if wanted is not None and entry.layout(wanted) in ENCODABLE:
        return entry.layout(wanted)
    fitting = [item for item in entry.layouts if item in ENCODABLE]
    if wanted is not None or not fitting:
        raise UnknownLayout(
            f"{entry.name} cannot be encoded to {wanted or ', '.join(entry.layouts)}; there are "
            f"{', '.join(fitting or ENCODABLE)}",
            field="layout",
        )
    return fitting[0]


def _measure(shape: Sequence[int], entry: VaeEntry, layout: LatentLayout) -> Geometry:
    """Sizes of the pictures, if the VAE can divide them."""
    is_video = LAYOUTS[layout].is_video
    form = "(batch, frames, height, width, 3)" if is_video else "(batch, height, width, 3)"
    if len(shape) != form.count(",") + 1 or shape[-1] != 3:
        raise InvalidRank(f"pictures are {list(shape)}, {entry.name} takes {form}", field="pictures")
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
    if (num_frames - 1) % entry.temporal:
        raise InvalidSize(
            f"there are {num_frames} frames, {entry.name} takes 1 and multiples of {entry.temporal} more",
            field="num_frames",
        )
    return Geometry(batch=batch, num_frames=num_frames, height=height, width=width, is_video=is_video)


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
