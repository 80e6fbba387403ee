"""Query parameters and headers of the routes, as JSON schemas: what is no option of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from broker_config.link_signing import EXPIRES, SIGNATURE
from producer.gateway.decodes import MOST_JOBS
from producer.gateway.webhooks import MOST_DELIVERIES

#: Content type of server-sent events.
EVENTS: Final = "text/event-stream"

WAIT: Final[Mapping[str, Mapping[str, Any]]] = {
    "wait": {
        "type": "number",
        "minimum": 0,
        "description": "Seconds to wait for the job's end, at most LATENTQ_GATEWAY_WAIT_S.",
    }
}
PREFER: Final[Mapping[str, Mapping[str, Any]]] = {
    "Prefer": {"type": "string", "description": "`wait=n`: wait up to n seconds for the job's end."}
}
RANGE: Final[Mapping[str, Mapping[str, Any]]] = {"Range": {"type": "string"}, "If-None-Match": {"type": "string"}}
LIST: Final[Mapping[str, Mapping[str, Any]]] = {
    "status": {"type": "string", "enum": ["queued", "processing", "succeeded", "failed", "canceled"]},
    "vae": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST_JOBS, "default": 50},
    "cursor": {"type": "string", "description": "`next_cursor` of the page before."},
}
#: Of a signed link, instead of a key.
LINK: Final[Mapping[str, Mapping[str, Any]]] = {
    EXPIRES: {"type": "integer", "description": "Of a signed link: when it ends, in seconds since the epoch."},
    SIGNATURE: {"type": "string", "description": "Of a signed link."},
}
DELIVERIES: Final[Mapping[str, Mapping[str, Any]]] = {
    "state": {"type": "string", "enum": ["dead", "pending"], "default": "dead"},
    "limit": {"type": "integer", "minimum": 1, "maximum": MOST_DELIVERIES, "default": 50},
    "cursor": LIST["cursor"],
    "job": {"type": "string", "description": "Instead of the others: what is kept of this job's deliveries."},
}
REMOTE: Final[Mapping[str, Mapping[str, Any]]] = {
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 8},
    "dtype": {"type": "string", "enum": ["float16", "bfloat16", "float32"]},
    "output_type": {"type": "string", "enum": ["pil", "pt", "mp4"], "default": "pil"},
    "image_format": {"type": "string", "enum": ["jpg", "png", "webp"], "default": "jpg"},
    "partial_postprocess": {"type": "string", "enum": ["True", "False", "true", "false"]},
    "do_scaling": {"type": "string", "enum": ["True", "False", "true", "false"]},
    "frames": {"type": "integer", "minimum": 1},
}
#: Both or neither: without them the body is a picture.
REMOTE_ENCODE: Final[Mapping[str, Mapping[str, Any]]] = {name: REMOTE[name] for name in ("shape", "dtype")}
WAIT_ON: Final[Mapping[str, Mapping[str, Any]]] = {
    "form": {"type": "string", "enum": ["image", "mp4", "tensor", "pixels", "unit"]},
    "hop": {"type": "integer"},
    "base64": {"type": "integer", "enum": [0, 1]},
    "image": {"type": "string"},
}
