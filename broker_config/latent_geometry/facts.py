"""Facts of a decode that are neither in the latents nor in the VAE's config, so that they travel with the job.

They are optional fields of the job's message and options of a submit, under the same names. `checked_facts` is the one
place that knows which values they may have; producers call it before anything is sent, and readers of a message call it
again, since whoever can write to the broker can write a message.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from broker_config.errors import InvalidOption

#: Patches, layers and groups of frames beyond this are no pipeline's; a bound keeps arithmetic on them harmless.
_LARGEST_COUNT: Final = 4096
#: A whole number of JSON may be beyond it, which `float` and `math.isfinite` raise of.
_LARGEST_NUMBER: Final = sys.float_info.max
#: torch.Generator.manual_seed takes 64 bits.
_LARGEST_SEED: Final = 2**64 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentFacts:
    """What travels with a job beside its latents' size; None where the pipeline has no such thing."""

    #: Side of the square patches of packed latents; None: the catalogue's.
    patch_size: int | None = None
    #: Pictures of the `layers` layout.
    layers: int | None = None
    #: Leading latent frames that are not decoded (CogVideoX 1.5 pads its clips with them).
    additional_frames: int | None = None
    #: Frames in one call of the VAE, of `video_chunks` and `video_sections` latent frames in each; None: as the
    #: layout's pipeline does.
    frames_per_call: int | None = None
    #: Tiles in which `video_blended` latents are decoded, rows x columns + the latent pixels they share; None: 4x4+3.
    blended_tiles: str | None = None
    #: The scheduler's `sigma_data` (Cosmos).
    sigma_data: float | None = None
    #: Timestep at which a VAE with `timestep_conditioning` decodes (LTX-Video).
    decode_timestep: float | None = None
    #: Share of noise mixed in before; None: as `decode_timestep`.
    decode_noise_scale: float | None = None
    #: Seed of the CPU generator that noise is drawn from, if it has drawn nothing yet.
    seed: int | None = None
    #: State of that generator otherwise, as torch has it: deflated (half of it is zeros), in base64 for URLs.
    noise_state: str | None = None
    #: Class of the pipeline's own VAE, which the worker's must have.
    vae_class: str | None = None
    #: Digest of its config (`vae_identity.config_digest`), likewise.
    vae_config: str | None = None
    #: Commit of its weights, likewise.
    vae_revision: str | None = None

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Rows and columns of tiles, and the latent pixels they share.

        Source of the default: pipelines/ltx/pipeline_ltx_i2v_long_multi_prompt.py `__call__`.
        """
        rows, columns, overlap = re.findall(r"\d+", self.blended_tiles or "4x4+3")
        return int(rows), int(columns), int(overlap)


def checked_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are facts and not None, if they have allowed values.

    Raises:
        InvalidOption: a value that no pipeline has.
    """
    checked = {}
    for name, check in FACTS.items():
        value = values.get(name)
        if value is not None:
            checked[name] = check(name, value)
    return checked


def finite(name: str, value: object) -> float:
    """`value`, if it is a number that a float holds.

    Raises:
        InvalidOption: it is something else, too large, or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
        raise InvalidOption(f"{name} is {value!r:.90}, expected a finite number", field=name)
    return float(value)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_COUNT:
        raise InvalidOption(f"{name} is {value!r}, expected a whole number from 1 to {_LARGEST_COUNT}", field=name)
    return value


def _count_or_none(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_COUNT:
        raise InvalidOption(f"{name} is {value!r}, expected a whole number from 0 to {_LARGEST_COUNT}", field=name)
    return value


def _positive(name: str, value: object) -> float:
    number = finite(name, value)
    if number <= 0:
        raise InvalidOption(f"{name} is {value!r}, expected a number above 0", field=name)
    return number


def _share(name: str, value: object) -> float:
    number = finite(name, value)
    if not 0 <= number <= 1:
        raise InvalidOption(f"{name} is {value!r}, expected a number from 0 to 1", field=name)
    return number


def _seed(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_SEED:
        raise InvalidOption(f"{name} is {value!r}, expected a whole number from 0 to 2^64 - 1", field=name)
    return value


def _matching(pattern: str, what: str) -> Callable[[str, object], str]:
    compiled = re.compile(pattern)

    def check(name: str, value: object) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise InvalidOption(f"{name} is {value!r:.90}, expected {what}", field=name)
        return value

    return check


#: Every fact, and what checks it.
FACTS: Final[Mapping[str, Callable[[str, object], Any]]] = {
    "patch_size": _count,
    "layers": _count,
    "additional_frames": _count_or_none,
    "frames_per_call": _count,
    "blended_tiles": _matching(r"[1-9]\d?x[1-9]\d?\+\d{1,2}", "rows x columns + overlap, as 4x4+3"),
    "sigma_data": _positive,
    "decode_timestep": _share,
    "decode_noise_scale": _share,
    "seed": _seed,
    "noise_state": _matching(r"[\w-]{1000,8000}", "the state of a CPU generator, deflated, in base64"),
    "vae_class": _matching(r"[A-Za-z0-9]{1,100}", "the name of a class"),
    "vae_config": _matching(r"[0-9a-f]{16}", "16 hex digits"),
    "vae_revision": _matching(r"[\w.-]{1,100}", "a commit, branch or tag"),
}

if set(FACTS) != {item.name for item in dataclasses.fields(LatentFacts)}:
    raise AssertionError("every fact has a check, and every check a fact")
