"""What the OpenAPI document says of bodies of requests, by the name that the table of routes has for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from broker_config.webhook_secrets import LONGEST_OVERLAP_S, OVERLAP_S
from producer.gateway.submit_bodies import MULTIPART, RAW, SAFETENSORS

#: Bytes.
BINARY: Final = {"type": "string", "contentMediaType": "application/octet-stream", "format": "binary"}


def _json_body(needed: str, **more: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with one text that it needs."""
    properties = {needed: {"type": "string"}, **more}
    schema = {"type": "object", "required": [needed], "properties": properties}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


_LATENTS: Final = {"type": "string", "contentMediaType": "application/octet-stream"}
BODIES: Final[Mapping[str, dict[str, Any]]] = {
    "submit": {
        "required": True,
        "description": "A safetensors file; raw elements, shape and dtype in the query; or parts, options and latents.",
        "content": {
            SAFETENSORS: {"schema": BINARY},
            RAW: {"schema": BINARY},
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["latents"],
                    "properties": {"options": {"$ref": "#/components/schemas/Options"}, "latents": _LATENTS},
                },
                "encoding": {"options": {"contentType": "application/json"}},
            },
        },
    },
    "batch": {
        "required": True,
        "description": "A part `jobs`, then one part of latents for each job, whatever its name.",
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["jobs", "latents"],
                    "properties": {
                        "jobs": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Options"}},
                        "latents": {"type": "array", "items": _LATENTS},
                    },
                },
                "encoding": {"jobs": {"contentType": "application/json"}},
            }
        },
    },
    "redecode": {
        "required": False,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/OptionsAgain"}}},
    },
    "remote": {
        "required": True,
        "description": "The latents' bytes, little-endian, in C order; `tensor/base64`: JSON with base64 of them.",
        "content": {
            "tensor/binary": {"schema": BINARY},
            "tensor/base64": {
                "schema": {"type": "object", "required": ["inputs"], "properties": {"inputs": {"type": "string"}}}
            },
        },
    },
    "picture": {
        "required": True,
        "description": "A picture, whatever Content-Type says; with `shape` and `dtype` a tensor's bytes.",
        "content": {kind: {"schema": BINARY} for kind in ("image/png", "image/jpeg", "image/webp", "tensor/binary")},
    },
    "token": _json_body("token"),
    "ping": _json_body("url"),
    "secret": _json_body(
        "secret", overlap_s={"type": "number", "minimum": 0, "maximum": LONGEST_OVERLAP_S, "default": OVERLAP_S}
    ),
}
