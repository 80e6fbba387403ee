"""Options of a job, checked: what is said, whether it goes together, and whether the output can hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, TypeVar

from broker_config.blob_store import LARGEST_BYTES
from broker_config.errors import InvalidOption, InvalidSize, PixelLimitExceeded
from broker_config.keys import Priority
from broker_config.latent_geometry import Geometry, LatentLayout, LatentState
from broker_config.latent_geometry.facts import finite
from broker_config.messages import Mode, Output, check_job_id
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeEntry
from producer.decode_options import DecodeOptions
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
    if state is LatentState.RECIPROCAL and options.shift_factor:
        raise InvalidOption(
            f"shift_factor is {options.shift_factor!r}, but pipelines whose latents are {state} add none: leave it out",
            field="shift_factor",
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


def checked_count(name: str, value: object) -> int | None:
    """`value`, if it is a whole number above 0, or None.

    Raises:
        InvalidOption: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidOption(f"{name} is {value!r}, expected a whole number above 0", field=name)
    return value


def check_patches(shape: Sequence[int], layout: LatentLayout, state: LatentState) -> None:
    """Whether latents can be cut into the patches that their normalisation is of.

    Raises:
        InvalidSize: an odd number of rows or columns.
    """
    if state.is_batch_norm and layout is LatentLayout.UNPACKED and any(size % 2 for size in shape[-2:]):
        raise InvalidSize(
            f"latents {list(shape)} have an odd side, and are normalised in patches of 2 × 2 ({state}): make it even",
            field="latents",
        )


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


def check_result_size(output: Output, geometry: Geometry, entry: VaeEntry, settings: Settings) -> None:
    """Whether a decode's output may fit where it is to lie.

    Raises:
        InvalidOption: it certainly makes more bytes of one item than the broker holds in a value.
    """
    if settings.blob_store is not None:
        return
    each = {Output.UINT8: 1, Output.TENSOR: 2}.get(output)  # of a tensor at least: float32 is twice that
    if each is None:
        return
    size = geometry.num_frames * geometry.height * geometry.width * entry.pixel_channels * each
    if size > LARGEST_BYTES:
        raise InvalidOption(
            f"output {output} makes at least {size} bytes of an item, and the broker holds {LARGEST_BYTES} in a value: "
            f"choose {'mp4' if geometry.is_video else 'png'}, or set LATENTQ_BLOB_STORE",
            field="output",
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
    number = finite(name, value)
    if name == "scaling_factor" and number == 0:
        raise InvalidOption(f"{name} is {value!r}, expected a finite number", field=name)
    return number
