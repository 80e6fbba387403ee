"""What a finished job points to: the result record, as a worker writes it and clients read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from broker_config.messages import BlobRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One encoded image, video or tensor."""

    #: Its bytes.
    blob: BlobRef
    #: MIME type.
    content_type: str
    #: File extension without dot.
    extension: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeResult:
    """What a finished job points to, and how it came about."""

    #: One artifact for each item of the batch.
    artifacts: tuple[Artifact, ...]
    #: Seconds: wait, fetch, decode, encode, store.
    timings_s: Mapping[str, float]
    #: Facts of the decode: vae, weights, dtype, device, mode, batch shared, tiling.
    decoded_by: Mapping[str, Any]

    def to_wire(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_wire(cls, data: bytes | str) -> Self:
        wire = json.loads(data)
        artifacts = tuple(
            Artifact(blob=BlobRef(**item["blob"]), content_type=item["content_type"], extension=item["extension"])
            for item in wire["artifacts"]
        )
        return cls(artifacts=artifacts, timings_s=wire["timings_s"], decoded_by=wire["decoded_by"])
