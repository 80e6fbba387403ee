"""From latents and options to a checked request: everything that can be refused is refused here.

Nothing is sent and nothing larger than the latents is allocated before every check has passed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import uuid_utils

from broker_config.blob_store import draft
from broker_config.errors import InvalidOption
from broker_config.latent_geometry import (
    FACTS,
    LAYOUTS,
    Geometry,
    LatentFacts,
    LatentLayout,
    LatentState,
    checked_facts,
    measure,
)
from broker_config.messages import DecodeRequest, Kind
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog, VaeEntry
from producer.decode_options import DecodeOptions
from producer.option_checks import (
    check_noise,
    check_patches,
    check_pixels,
    check_result_size,
    checked_count,
    checked_options,
    checked_state,
)
from producer.preview_option import preview_of
from producer.tensor_input import TensorFile


def new_job_id() -> str:
    """A new id that sorts by time (UUIDv7)."""
    return str(uuid_utils.uuid7())


def build_request(
    tensor: TensorFile, options: DecodeOptions, *, catalog: VaeCatalog, settings: Settings
) -> DecodeRequest:
    """The request for these latents, or the reason why not. Its `latents` are a draft until they are stored.

    Raises:
        InvalidJob: one of its subclasses, naming the field and the fix.
    """
    entry = catalog[options.vae]
    layout = entry.layout(options.layout, rank=len(tensor.shape), state=options.state)
    facts = checked_facts({name: getattr(options, name) for name in FACTS})
    state = checked_state(options, entry, layout)
    if state is LatentState.POSTERIOR:
        raise InvalidOption(
            "state is posterior, of which latents are still to be drawn: draw them first", field="state"
        )
    check_noise(options, entry)
    geometry = measure(
        layout,
        tensor.shape,
        vae=entry,
        height=checked_count("height", options.height),
        width=checked_count("width", options.width),
        num_frames=checked_count("num_frames", options.num_frames),
        facts=LatentFacts(**facts),
    )
    check_patches(tensor.shape, layout, state)
    check_pixels(geometry, settings)
    checked = checked_options(options, entry=entry, geometry=geometry, settings=settings)
    check_result_size(checked["output"], geometry, entry, settings)
    checked["preview"] = preview_of(options.preview, entry, layout=layout, state=state, catalog=catalog)
    return request_of(
        tensor, facts | checked, options=options, entry=entry, layout=layout, state=state, geometry=geometry
    )


def request_of(
    tensor: TensorFile,
    checked: Mapping[str, Any],
    *,
    options: DecodeOptions,
    entry: VaeEntry,
    layout: LatentLayout,
    state: LatentState,
    geometry: Geometry,
    kind: Kind = Kind.DECODE,
) -> DecodeRequest:
    """The request for a tensor that was measured, with `checked` facts and options. Copies what it holds."""
    job_id = options.job_id or new_job_id()
    sha256 = hashlib.sha256(tensor.data).hexdigest()  # the first use of `data`: the latents are copied here
    request = DecodeRequest(
        job_id=job_id,
        vae=entry.name,
        layout=layout,
        # The digest is in the name: another submit under this id cannot overwrite latents that were accepted.
        latents=draft(f"{job_id}.in.{sha256[:16]}", tensor.data),
        shape=tensor.shape,
        dtype=tensor.dtype,
        height=geometry.height,
        width=geometry.width,
        batch=geometry.batch,
        num_frames=geometry.num_frames,
        state=None if state is LAYOUTS[layout].state else str(state),
        kind=kind,
        **checked,
    )
    return dataclasses.replace(request, schema_version=request.needed_version)
