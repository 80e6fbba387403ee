"""From latents and options to a checked request: everything that can be refused is refused here.

Nothing is sent and nothing larger than the latents is allocated before every check has passed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeVar

import uuid_utils

from broker_config.blob_store import draft
from broker_config.errors import InvalidOption, PixelLimitExceeded
from broker_config.keys import Priority
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
from broker_config.messages import DecodeRequest, Kind, Mode, Output, check_job_id
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog, VaeEntry
from producer.preview_option import preview_of
from producer.tensor_input import TensorFile
from producer.webhook_option import checked_webhook, own_secrets, retention_with_webhook

E = TypeVar("E", bound=StrEnum)

#: Pixels a slow worker decodes in a second: SD's VAE in float32 on two cores does 65,000.
_SLOWEST_PX_PER_S: Final = 50_000
_TIMEOUT_FACTOR: Final = 10
#: PNG's limit for a keyword (PNG specification, 11.3.4.2).
_METADATA_KEY_CHARS: Final = 79
#: Pixels a side: libjpeg's JPEG_MAX_DIMENSION, libwebp's WEBP_MAX_DIMENSION, x264's MAX_RESOLUTION.
_LONGEST_SIDE_PX: Final = {Output.JPG: 65_500, Output.WEBP: 16_383, Output.MP4: 16_384}
#: A JPEG segment holds 65,533 bytes; metadata lies in one, in UTF-16, and our provenance takes up to 4,000 of them.
_JPG_METADATA_BYTES: Final = 61_000
#: An mp4's frame rate is a fraction with a denominator of at most 1,001.
_SLOWEST_FPS: Final = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """Options of a job, as the caller gave them. One vocabulary for Python, CLI and HTTP; see docs/options.md."""

    #: Name in the catalogue.
    vae: str
    #: None: the one that fits the latents' rank.
    layout: str | None = None
    #: Pixels; needed for packed latents.
    height: int | None = None
    #: Pixels; needed for packed latents.
    width: int | None = None
    #: Frames of each clip; None: what the latents decode to.
    num_frames: int | None = None
    #: Frames per second of an mp4; None: the catalogue's.
    fps: float | None = None
    #: png, jpg, webp, mp4, tensor, uint8; None: png for pictures, mp4 for clips.
    output: str | None = None
    #: exact or fast; None: the worker's default.
    mode: str | None = None
    #: high, normal or low.
    priority: str = Priority.NORMAL
    #: Longest attempt, seconds; None: ten times the estimate, at least a minute.
    timeout_s: float | None = None
    #: Longest wait for a worker, seconds; None: any.
    start_within_s: float | None = None
    #: How long latents and artifacts stay after the end, seconds; None: the setting.
    retention_s: float | None = None
    #: None: the VAE's config.
    scaling_factor: float | None = None
    #: None: the VAE's config.
    shift_factor: float | None = None
    #: Which normalisation the latents carry; None: the catalogue's (docs/vaes.md).
    state: str | None = None
    #: Side of the square patches of packed latents; None: the catalogue's.
    patch_size: int | None = None
    #: Pictures of the `layers` layout.
    layers: int | None = None
    #: Leading latent frames that are not decoded.
    additional_frames: int | None = None
    #: Frames, or latent frames of `video_chunks`, in one call of the VAE; None: the layout's.
    frames_per_call: int | None = None
    #: Tiles of `video_blended`: rows x columns + latent pixels of overlap; None: the pipeline's 4x4+3.
    blended_tiles: str | None = None
    #: The scheduler's.
    sigma_data: float | None = None
    #: Timestep at which a VAE with timestep conditioning decodes.
    decode_timestep: float | None = None
    #: Share of noise mixed in before; None: as `decode_timestep`.
    decode_noise_scale: float | None = None
    #: Seed of the generator that noise is drawn from, if it has drawn nothing yet.
    seed: int | None = None
    #: State of that generator otherwise; `generator` of a submit becomes it.
    noise_state: str | None = None
    #: Class the worker's VAE must have; None: the catalogue's.
    vae_class: str | None = None
    #: Digest its config must have; None: any.
    vae_config: str | None = None
    #: Commit its weights must be of; None: any.
    vae_revision: str | None = None
    #: URL that is told how the job goes; None: none is.
    webhook: str | None = None
    #: Of queued, processing, progress, succeeded, failed, canceled; None: the last three.
    webhook_events: Sequence[str] | None = None
    #: Whether artifacts that are small enough travel in the message.
    webhook_inline: bool = False
    #: Signs the messages (`whsec_…`; several, separated by commas, while they change); None: the key's, or the default.
    webhook_secret: str | None = field(default=None, repr=False)
    #: Written into the artifacts.
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: Whether artifacts carry our provenance record.
    provenance: bool = True
    #: Whether the decode may be tiled, which is not exact and can leave seams, when memory is short.
    allow_tiling: bool = False
    #: Whether a small VAE that takes the same latents shows a preview first.
    preview: bool = False
    #: None: a new UUIDv7.
    job_id: str | None = None


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
        height=_count("height", options.height),
        width=_count("width", options.width),
        num_frames=_count("num_frames", options.num_frames),
        facts=LatentFacts(**facts),
    )
    check_pixels(geometry, settings)
    checked = checked_options(options, entry=entry, geometry=geometry, settings=settings)
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


def check_noise(options: DecodeOptions, entry: VaeEntry) -> None:
    """Whether what is said of noise says all of it.

    Raises:
        InvalidOption: a fact without the one it belongs to, two that say the same, or one that is missing.
    """
    given = [name for name in ("seed", "noise_state") if getattr(options, name) is not None]
    if len(given) > 1:
        raise InvalidOption("noise_state is given beside seed: both say where noise starts", field="noise_state")
    if entry.draws_noise and not given:
        raise InvalidOption(
            f"seed is missing, and {entry.name} decodes from noise: give `seed`, or the pipeline's `generator`",
            field="seed",
        )
    if options.decode_noise_scale is not None:
        given.append("decode_noise_scale")
    if given and options.decode_timestep is None and not entry.draws_noise:
        raise InvalidOption(
            f"{given[0]} is given without decode_timestep, and no noise is mixed in without it: give both",
            field=given[0],
        )


def checked_state(options: DecodeOptions, entry: VaeEntry, layout: LatentLayout) -> LatentState:
    """Which normalisation the latents carry, if that goes with the other options.

    Raises:
        InvalidOption: no such state, a factor it has no use for, or a fact that is missing.
    """
    state = entry.state_of(layout, options.state)
    for name in ("scaling_factor", "shift_factor"):
        value = getattr(options, name)
        if value is not None and not state.takes_factors:
            raise InvalidOption(
                f"{name} is {value!r}, but {entry.name}'s latents are {state}: they are brought back by the VAE's own "
                f"statistics, or not at all. Leave {name} out",
                field=name,
            )
    if state.needs_sigma_data and options.sigma_data is None:
        raise InvalidOption(
            f"sigma_data is missing, which latents that are {state} need: give `pipe.scheduler.config.sigma_data`",
            field="sigma_data",
        )
    if options.sigma_data is not None and not state.needs_sigma_data:
        raise InvalidOption(
            f"sigma_data is {options.sigma_data!r}, but {entry.name}'s latents are {state}: leave it out",
            field="sigma_data",
        )
    return state


def checked_options(
    options: DecodeOptions, *, entry: VaeEntry, geometry: Geometry, settings: Settings
) -> dict[str, Any]:
    """The options that do not depend on the latents' numbers, checked, with defaults filled in; not `job_id`.

    Raises:
        InvalidOption: a value that is not allowed.
    """
    _check_id(options.job_id)
    output = _output(options.output, geometry, entry)
    metadata = checked_metadata(options.metadata, max_bytes=settings.max_metadata_bytes)
    _check_encoder(output, geometry, metadata)
    timeout_s = _seconds("timeout_s", options.timeout_s)
    if timeout_s is not None and timeout_s < settings.timeout_min_s:
        raise InvalidOption(
            f"timeout_s is {timeout_s:g}, expected at least {settings.timeout_min_s:g} (LATENTQ_TIMEOUT_MIN_S): past "
            "it the worker's process ends, and a device that is only slow would end with it",
            field="timeout_s",
        )
    if timeout_s is None:
        pixels = geometry.height * geometry.width * geometry.num_frames * geometry.batch
        timeout_s = max(settings.timeout_min_s, _TIMEOUT_FACTOR * pixels / _SLOWEST_PX_PER_S)
    webhook = checked_webhook(options, settings)
    own_secrets(options)
    return {
        "output": output,
        "fps": _fps(options.fps, entry),
        "mode": _one_of(Mode, "mode", options.mode) if options.mode is not None else None,
        "priority": _one_of(Priority, "priority", options.priority),
        "timeout_s": timeout_s,
        "start_within_s": _seconds("start_within_s", options.start_within_s),
        "retention_s": retention_with_webhook(_seconds("retention_s", options.retention_s), webhook, settings),
        "webhook": webhook,
        "scaling_factor": _factor("scaling_factor", options.scaling_factor),
        "shift_factor": _factor("shift_factor", options.shift_factor),
        "metadata": metadata,
        "provenance": _flag("provenance", options.provenance),
        "allow_tiling": _flag("allow_tiling", options.allow_tiling),
    }


def checked_metadata(metadata: Mapping[str, str], *, max_bytes: int) -> dict[str, str]:
    """Metadata that every format can hold.

    Raises:
        InvalidOption: a key or value that is not a string, a key PNG cannot hold, or too much.
    """
    if not isinstance(metadata, Mapping):
        raise InvalidOption("metadata is not a map of strings", field="metadata")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidOption(f"metadata[{key!r}] is not a string: convert it first", field="metadata")
        printable = key.isprintable() and all(ord(letter) < 256 for letter in key)
        if not 1 <= len(key) <= _METADATA_KEY_CHARS or not printable or key != key.strip() or "  " in key:
            raise InvalidOption(
                f"metadata key {key[:90]!r} is not 1 to {_METADATA_KEY_CHARS} printable latin-1 characters without "
                "outer or double spaces",
                field="metadata",
            )
        if key == "latentq":
            raise InvalidOption("metadata key 'latentq' is taken: rename it", field="metadata")
        if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InvalidOption(
                f"metadata[{key!r}] has a NUL character or a lone surrogate: no file format holds it, remove it",
                field="metadata",
            )
    size = len(json.dumps(dict(metadata)).encode())
    if size > max_bytes:
        raise InvalidOption(
            f"metadata has {size} bytes as JSON, at most {max_bytes} are taken (LATENTQ_MAX_METADATA_BYTES)",
            field="metadata",
        )
    return dict(metadata)


def check_pixels(geometry: Geometry, settings: Settings) -> None:
    """Whether the pictures are within the limits.

    Raises:
        PixelLimitExceeded: they are not.
    """
    picture = geometry.height * geometry.width
    if picture > settings.max_image_px:
        raise PixelLimitExceeded(
            f"{geometry.width} × {geometry.height} = {picture} px exceed the limit of {settings.max_image_px} px a "
            "picture (LATENTQ_MAX_IMAGE_PX)",
            field="latents",
        )
    whole = picture * geometry.num_frames * geometry.batch
    if whole > settings.max_clip_px:
        raise PixelLimitExceeded(
            f"{geometry.batch} × {geometry.num_frames} frames of {geometry.width} × {geometry.height} = {whole} px "
            f"exceed the limit of {settings.max_clip_px} px a job (LATENTQ_MAX_CLIP_PX)",
            field="latents",
        )


def _check_encoder(output: Output, geometry: Geometry, metadata: Mapping[str, str]) -> None:
    """Refuses what the format could not hold once it is decoded."""
    longest, limit = max(geometry.height, geometry.width), _LONGEST_SIDE_PX.get(output)
    if limit is not None and longest > limit:
        other = "uint8" if output is Output.MP4 else "png"
        raise InvalidOption(
            f"output {output} holds {limit} px a side, these decode to {geometry.width} × {geometry.height}: "
            f"choose {other}",
            field="output",
        )
    if output is Output.JPG:
        size = len(json.dumps(metadata, ensure_ascii=False).encode("utf-16-be"))
        if size > _JPG_METADATA_BYTES:
            raise InvalidOption(
                f"output jpg holds {_JPG_METADATA_BYTES} bytes of metadata in UTF-16, these are {size}: choose png",
                field="metadata",
            )


def _output(wanted: str | None, geometry: Geometry, entry: VaeEntry) -> Output:
    if wanted is None:
        return Output.TENSOR if entry.is_hdr else Output.MP4 if geometry.is_video else Output.PNG
    output = _one_of(Output, "output", wanted)
    if entry.is_hdr and output is not Output.TENSOR:
        raise InvalidOption(
            f"output {output} ends at white, and {entry.name} decodes to light beyond it: choose tensor", field="output"
        )
    if output is Output.MP4 and not geometry.is_video:
        raise InvalidOption("output mp4 needs a clip; these latents are pictures: choose png", field="output")
    if output is Output.JPG and entry.pixel_channels == 4:
        raise InvalidOption(
            f"output jpg holds no transparency, and {entry.name} decodes to RGBA: choose png or webp", field="output"
        )
    return output


def _one_of(kind: type[E], name: str, value: object) -> E:
    try:
        return kind(str(value))
    except ValueError:
        raise InvalidOption(f"{name} is {value!r}, expected one of {', '.join(kind)}", field=name) from None


def _check_id(job_id: object) -> None:
    if job_id is None:
        return
    if not isinstance(job_id, str):
        raise InvalidOption(f"job_id {job_id!r} is not a string: convert it first", field="job_id")
    check_job_id(job_id)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidOption(f"{name} is {value!r}, expected True or False", field=name)
    return value


def _count(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidOption(f"{name} is {value!r}, expected a whole number above 0", field=name)
    return value


def _seconds(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 31_536_000:
        raise InvalidOption(f"{name} is {value!r}, expected seconds above 0, at most a year", field=name)
    return float(value)


def _fps(value: object, entry: VaeEntry) -> float:
    if value is None:
        return entry.fps
    if isinstance(value, bool) or not isinstance(value, int | float) or not _SLOWEST_FPS <= value <= 240:
        raise InvalidOption(f"fps is {value!r}, expected a number from {_SLOWEST_FPS} to 240", field="fps")
    return float(value)


def _factor(name: str, value: object) -> float | None:
    if value is None:
        return None
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if wrong or (name == "scaling_factor" and value == 0):
        raise InvalidOption(f"{name} is {value!r}, expected a finite number", field=name)
    assert isinstance(value, int | float)
    return float(value)
