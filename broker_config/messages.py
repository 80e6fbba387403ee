"""What travels: the decode request.

Messages are JSON with a `schema_version`. A worker that meets a newer version parks the job for a newer
worker (it never fails it); a field a reader does not know is ignored, a field it misses takes its default.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import NoneType
from typing import Any, Final, Self

from broker_config.errors import InvalidOption, UnsupportedMessage
from broker_config.keys import Priority
from broker_config.latent_geometry import FACTS, LAYOUTS, LatentFacts, LatentLayout, LatentState, checked_facts
from broker_config.webhooks import Webhook

#: 2 added the layouts beyond the first four, `state`, and the facts of `LatentFacts`.
SCHEMA_VERSION: Final = 2
#: What a reader of version 1 knows; a message is of version 2 only if such a reader would decode it wrongly.
_FIRST_LAYOUTS: Final = frozenset({"unpacked", "packed", "video", "video_2d"})
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

#: The functions jobs name. Workers look them up in an allow-list; RQ never imports them.
DECODE_FUNCTION: Final = "worker.handlers.decode"
ENCODE_FUNCTION: Final = "worker.handlers.encode"


class Kind(StrEnum):
    """What a job is for."""

    #: Latents become pictures.
    DECODE = "decode"
    #: Pictures become latents.
    ENCODE = "encode"


class Output(StrEnum):
    """What a decode is turned into."""

    PNG = "png"
    JPG = "jpg"
    WEBP = "webp"
    MP4 = "mp4"
    #: The VAE's own output, as safetensors: float (C, H, W) or (C, F, H, W), usually in [-1, 1].
    TENSOR = "tensor"
    #: After postprocessing, as safetensors: uint8 (H, W, C) or (F, H, W, C).
    UINT8 = "uint8"


class Mode(StrEnum):
    """How much may differ from the pipeline's own decode."""

    #: The job is decoded by itself: the same bits as in-process. The CPU's default.
    EXACT = "exact"
    #: Jobs of one shape may share a batch, which changes last bits. The GPU's default.
    FAST = "fast"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobRef:
    """Where bytes lie. `name` is opaque: a worker resolves it under its own configured store."""

    #: `redis`, or the id of the store outside the broker (an id, never a path or a URL).
    store: str
    #: Name within the store.
    name: str
    #: Hex digest of the bytes, checked at every read.
    sha256: str
    #: Length of the blob.
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRequest:
    """Everything a worker needs to decode one job."""

    #: Chosen by the client before the first try; `[A-Za-z0-9_-]{1,64}`.
    job_id: str
    #: Name in the catalogue.
    vae: str
    #: How the latents are laid out (`LatentLayout`).
    layout: str
    #: The latents, as a safetensors file with one tensor.
    latents: BlobRef
    #: Shape of the latents.
    shape: tuple[int, ...]
    #: float16, bfloat16 or float32.
    dtype: str
    #: Height of the decoded picture in pixels.
    height: int
    #: Width of the decoded picture in pixels.
    width: int
    #: Pictures or clips in the job.
    batch: int
    #: Frames of each clip; 1 for pictures.
    num_frames: int
    #: Frames per second of an mp4.
    fps: float
    #: What to make.
    output: Output
    #: None: the worker's default.
    mode: Mode | None = None
    #: Which queue.
    priority: Priority = Priority.NORMAL
    #: Longest time one attempt may take.
    timeout_s: float = 60.0
    #: Longest wait before the first attempt; None: any.
    start_within_s: float | None = None
    #: How long latents and artifacts stay after the end.
    retention_s: float = 86_400.0
    #: Overrides the VAE's config; None: the config's.
    scaling_factor: float | None = None
    #: Overrides the VAE's config; None: the config's.
    shift_factor: float | None = None
    #: Which normalisation the latents carry (`LatentState`); None: the layout's own.
    state: str | None = None
    #: The next thirteen: see `LatentFacts`.
    patch_size: int | None = None
    layers: int | None = None
    additional_frames: int | None = None
    frames_per_call: int | None = None
    blended_tiles: str | None = None
    sigma_data: float | None = None
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None
    seed: int | None = None
    noise_state: str | None = None
    vae_class: str | None = None
    vae_config: str | None = None
    vae_revision: str | None = None
    #: The caller's own facts (prompt, seed …), written into the artifacts.
    metadata: Mapping[str, str] = field(default_factory=dict)
    #: Whether artifacts carry our provenance record.
    provenance: bool = True
    #: Whether the decode may be tiled, which is not exact, when memory is short.
    allow_tiling: bool = False
    #: Catalogue name of the VAE that shows a preview first; None: no preview. A worker may leave it out.
    preview: str | None = None
    #: The job whose latents these are, when decoded again.
    source_job_id: str | None = None
    #: Who is told how the job goes; None: nobody.
    webhook: Webhook | None = None
    #: What the job is for. Of an encode, `latents`, `shape` and `dtype` are those of the pixels: uint8, (B, H, W, 3) or
    #: (B, F, H, W, 3), or floats as `vae.encode` takes them, (B, 3, H, W) or (B, 3, F, H, W); `layout` and `state` are
    #: those of the latents to make, `seed` that of their sampling.
    kind: Kind = Kind.DECODE
    #: Version of this message: the least whose readers understand all of it (`needed_version`).
    schema_version: int = 1

    @property
    def pixels(self) -> int:
        """Pixels of everything the job decodes to."""
        return self.height * self.width * self.num_frames * self.batch

    @property
    def facts(self) -> LatentFacts:
        """What of the decode is neither in the latents nor in the VAE's config."""
        return LatentFacts(**{name: getattr(self, name) for name in FACTS})

    @property
    def latent_state(self) -> LatentState:
        """Which normalisation the latents carry."""
        return LatentState(self.state) if self.state else LAYOUTS[LatentLayout(self.layout)].state

    @property
    def is_video(self) -> bool:
        """Whether the job makes clips."""
        return LAYOUTS[LatentLayout(self.layout)].is_video

    @property
    def needed_version(self) -> int:
        """The least schema version whose readers decode this as it is meant."""
        new = self.state is not None or any(getattr(self, name) is not None for name in FACTS)
        return 2 if new or self.kind is not Kind.DECODE or self.layout not in _FIRST_LAYOUTS else 1

    @property
    def bucket(self) -> str:
        """Jobs with one bucket may share a batch: same VAE, layout, latent shape, dtype and kind of output."""
        shape = "x".join(str(size) for size in self.shape[1:])
        kind = self.output if self.output in (Output.TENSOR, Output.MP4) else "pixels"
        scale = f"{self.scaling_factor}/{self.shift_factor}"
        mode = self.mode or "default"
        size = f"{self.height}x{self.width}x{self.num_frames}"  # of some clips the latents do not tell the frames
        bucket = f"{self.vae}|{self.layout}|{shape}|{size}|{self.dtype}|{kind}|{scale}|{mode}"
        # Noise is drawn for a job as a whole: two jobs of one seed have the same noise, a batch of two has not.
        noise = ("decode_timestep", "seed", "noise_state")
        alone = self.kind is Kind.ENCODE or any(getattr(self, name) is not None for name in noise)
        facts = {name: value for name in FACTS if name not in noise and (value := getattr(self, name)) is not None}
        if self.state is not None or facts:
            bucket += f"|{self.state}|" + ",".join(f"{name}={value}" for name, value in facts.items())
        return f"{bucket}|{self.job_id}" if alone else bucket

    @property
    def payload_hash(self) -> str:
        """Digest of everything that makes this request what it is: equal for a replay, different otherwise.

        Where the latents lie is no part of that: a replay stores them under another name, or in another store.
        """
        wire = self._to_json()
        wire["latents"] |= {"store": "", "name": ""}
        return hashlib.sha256(_canonical(wire)).hexdigest()

    def to_wire(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, defaults left out."""
        return _canonical(self._to_json())

    def _to_json(self) -> dict[str, Any]:
        wire: dict[str, Any] = {}
        for name in _request_fields():
            value = getattr(self, name)
            if value is None or value is Kind.DECODE:
                continue
            if not isinstance(value, str | int | float):
                if isinstance(value, BlobRef | Webhook):
                    value = dataclasses.asdict(value)
                elif isinstance(value, tuple):
                    value = list(value)
                elif not (value := dict(value)):
                    continue
            wire[name] = value
        return wire

    @classmethod
    def from_wire(cls, data: bytes | str) -> Self:
        """The request in `data`.

        Raises:
            UnsupportedMessage: not JSON, a newer `schema_version`, or a field that is missing or of a wrong type.
        """
        try:
            wire = json.loads(data)
            version = wire.get("schema_version")
            if not isinstance(version, int) or version > SCHEMA_VERSION:
                raise UnsupportedMessage(
                    f"schema_version is {version}, this process knows up to {SCHEMA_VERSION}: upgrade it"
                )
            known = _request_fields()
            wire = {key: value for key, value in wire.items() if key in known}
            _check_types(known, wire)
            wire["latents"] = BlobRef(**wire["latents"])
            wire["shape"] = tuple(int(size) for size in wire["shape"])
            wire["output"] = Output(wire["output"])
            wire["priority"] = Priority(wire.get("priority", Priority.NORMAL))
            if "mode" in wire:
                wire["mode"] = Mode(wire["mode"])
            wire["kind"] = Kind(wire.get("kind", Kind.DECODE))
            if wire.get("webhook") is not None:
                wire["webhook"] = Webhook.from_wire(wire["webhook"])
            if wire.get("state") is not None:
                LatentState(wire["state"])
            checked_facts(wire)
            return cls(**wire)
        except UnsupportedMessage:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UnsupportedMessage(f"the job's message cannot be read: {error}") from error


#: What JSON holds for a field, by its annotation; the others are made from their JSON, which checks them.
_JSON_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int, NoneType),
    "float": (int, float),
    "bool": (bool,),
    "str | None": (str, NoneType),
    "float | None": (int, float, NoneType),
    "Mapping[str, str]": (dict,),
}


def _canonical(wire: Mapping[str, Any]) -> bytes:
    return json.dumps(wire, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


@functools.cache
def _request_fields() -> Mapping[str, tuple[type, ...] | None]:
    """The request's fields, and what JSON holds for each; None: it is made from its JSON, which checks it."""
    return {spec.name: _JSON_TYPES.get(str(spec.type)) for spec in dataclasses.fields(DecodeRequest)}


def _check_types(known: Mapping[str, tuple[type, ...] | None], wire: Mapping[str, Any]) -> None:
    for name, value in wire.items():
        kinds = known[name]
        if kinds is None:
            continue
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not right or (dict in kinds and not all(isinstance(item, str) for item in value.values())):
            raise UnsupportedMessage(f"the job's message cannot be read: {name} is {value!a:.80}")


def check_job_id(job_id: str) -> str:
    """`job_id`, if it is one.

    Raises:
        InvalidOption: other characters than `A-Z a-z 0-9 _ -`, or not 1 to 64 of them.
    """
    if not JOB_ID.fullmatch(job_id):
        raise InvalidOption(
            f"job_id {job_id[:80]!r} is not 1 to 64 characters of A-Z a-z 0-9 _ -: choose another",
            field="job_id",
        )
    return job_id
