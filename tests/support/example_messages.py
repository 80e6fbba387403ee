"""One message to vary."""

from __future__ import annotations

import json
from typing import Any

from broker_config.messages import (
    BlobRef,
    DecodeRequest,
    Output,
)

BLOB = BlobRef(store="redis", name="j-1.in.0123", sha256="ab" * 32, size_bytes=1096)
REQUEST = DecodeRequest(
    job_id="j-1",
    vae="sd",
    layout="unpacked",
    latents=BLOB,
    shape=(2, 4, 8, 12),
    dtype="float16",
    height=64,
    width=96,
    batch=2,
    num_frames=1,
    fps=8.0,
    output=Output.PNG,
)


def wire_of(**changes: Any) -> bytes:
    wire = json.loads(REQUEST.to_wire()) | changes
    return json.dumps({name: value for name, value in wire.items() if value is not ...}).encode()
