"""The OpenAPI 3.1 document: made of the table of routes, the schema models and the options of a job."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from broker_config.job_document import Schema
from broker_config.keys import Priority
from broker_config.latent_geometry import LatentLayout
from broker_config.messages import Mode, Output
from broker_config.receiver_url import MAX_URL_CHARACTERS
from broker_config.webhooks import JOB_EVENTS
from producer.gateway import schemas
from producer.gateway.error_responses import PROBLEM_JSON
from producer.gateway.option_notes import option_notes
from producer.gateway.query import OPTIONS, SECRET_OPTIONS
from producer.gateway.request_bodies import BINARY, BODIES
from producer.gateway.route import Route
from producer.gateway.routes import ROUTES
from producer.pixel_input import ENCODE_OPTIONS

_REFERENCE: Final = "#/components/schemas/{model}"
#: Answers that any request can get. 431 and some 400 come before there is a request.
_ALWAYS: Final = (400, 401, 403, 404, 405, 408, 414, 421, 429, 500, 503)
_NAMES: Final = {
    400: "BadRequest",
    401: "NotAuthenticated",
    403: "NotAllowed",
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "UploadTooSlow",
    409: "Conflict",
    410: "Gone",
    411: "LengthRequired",
    413: "TooLarge",
    414: "QueryTooLong",
    415: "MediaTypeUnsupported",
    416: "RangeNotSatisfiable",
    421: "WrongHost",
    422: "Refused",
    429: "TooMany",
    500: "InternalError",
    502: "DecodeFailed",
    503: "NotNow",
}
_JOB_ID: Final = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
#: What is known of an option beyond its type.
_OPTION_FACTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "layout": {"enum": list(LatentLayout)},
    "output": {"enum": list(Output)},
    "mode": {"enum": list(Mode)},
    "priority": {"enum": list(Priority), "default": "normal"},
    "height": {"minimum": 1},
    "width": {"minimum": 1},
    "num_frames": {"minimum": 1},
    "fps": {"minimum": 0.001, "maximum": 240},
    "timeout_s": {"exclusiveMinimum": 0, "maximum": 31_536_000},
    "start_within_s": {"exclusiveMinimum": 0, "maximum": 31_536_000},
    "retention_s": {"exclusiveMinimum": 0, "maximum": 31_536_000},
    "job_id": {"pattern": _JOB_ID["pattern"]},
    "webhook": {"format": "uri", "maxLength": MAX_URL_CHARACTERS},
    "webhook_events": {"items": {"type": "string", "enum": [str(event) for event in JOB_EVENTS]}, "minItems": 1},
    "webhook_secret": {"writeOnly": True},
}
_TYPES: Final = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "Mapping[str, str]": "object",
    "Sequence[str]": "array",
}
#: Options that belong to the latents, which a redecode cannot change.
_OF_LATENTS: Final = ("vae", "layout", "height", "width", "num_frames")
#: Options that the remote-VAE protocol sets itself.
_REMOTE_SETS: Final = ("vae", "output", "job_id", "metadata", "retention_s")


def document() -> dict[str, Any]:
    """The whole document."""
    models = [
        value
        for value in vars(schemas).values()
        if isinstance(value, type) and issubclass(value, Schema) and value is not Schema
    ]
    _, definitions = models_json_schema([(model, "serialization") for model in models], ref_template=_REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        if not route.hidden:
            paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "latentq",
            "version": importlib.metadata.version("latentq"),
            "description": "Submit diffusion latents, get decoded images and videos back.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{}, {"bearer": []}, {"basic": []}, {"session": []}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"]
            | {"Options": _options_schema("all"), "OptionsAgain": _options_schema("again")},
            "responses": {name: _problem(name) for name in _NAMES.values()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A key of `latentq keys add`."},
                "basic": {"type": "http", "scheme": "basic", "description": "The key as password."},
                "session": {"type": "apiKey", "in": "cookie", "name": "latentq_session"},
            },
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": route.handler.__name__
        + route.method.capitalize()
        + str(route.path.count("{"))
        + str(len(route.path)),
        "parameters": _parameters(route),
        "responses": _responses(route),
    }
    if route.open:
        operation["security"] = [{}]
    if route.body:
        operation["requestBody"] = BODIES[route.body]
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in route.path.split("/"):
        if part.startswith("{"):
            name = part.strip("{}")
            kind = _JOB_ID if name == "id" else {"type": "string"}
            found.append({"name": name, "in": "path", "required": True, "schema": kind})
    for name, schema in route.query.items():
        required = route.options == "remote" and name in ("shape", "dtype")
        found.append({"name": name, "in": "query", "required": required, "schema": schema})
    if route.options == "all":
        found.append(
            {
                "name": "shape",
                "in": "query",
                "description": "Of raw latents.",
                "schema": {"type": "string", "pattern": r"^[0-9]{1,6}(,[0-9]{1,6}){0,7}$"},
            }
        )
        found.append(
            {
                "name": "dtype",
                "in": "query",
                "description": "Of raw latents.",
                "schema": {"type": "string", "enum": ["float16", "bfloat16", "float32"]},
            }
        )
    for name in _options(route.options):
        if name not in route.query and name not in SECRET_OPTIONS:
            found.append({"name": name, "in": "query", **_query_schema(name)})
    found += [{"name": name, "in": "header", "schema": schema} for name, schema in route.headers.items()]
    return found


def _options(which: str) -> list[str]:
    left_out: Mapping[str, tuple[str, ...]] = {
        "all": (),
        "again": _OF_LATENTS,
        "remote": _REMOTE_SETS,
        "encode": (*_REMOTE_SETS, *(set(OPTIONS) - ENCODE_OPTIONS)),
    }
    return [name for name in OPTIONS if name not in left_out[which]] if which else []


def _query_schema(name: str) -> dict[str, Any]:
    schema = _option_schema(name, nullable=False)
    if schema["type"] == "array":  # separated by commas
        return {"style": "form", "explode": False, "schema": schema}
    if schema["type"] == "object":  # a JSON object, as text
        return {"content": {"application/json": {"schema": schema}}}
    return {"schema": schema}


def _option_schema(name: str, *, nullable: bool = True) -> dict[str, Any]:
    annotation = OPTIONS[name]
    kind = _TYPES[annotation.removesuffix(" | None")]
    schema: dict[str, Any] = {"type": [kind, "null"] if nullable and "None" in annotation else kind}
    if kind == "object":
        schema["additionalProperties"] = {"type": "string"}
    facts = dict(_OPTION_FACTS.get(name, {}))
    if name in _notes():
        facts["description"] = _notes()[name]
    if nullable and "None" in annotation and "enum" in facts:
        facts["enum"] = [*facts["enum"], None]
    return schema | facts


@cache
def _notes() -> Mapping[str, str]:
    return option_notes()


def _options_schema(which: str) -> dict[str, Any]:
    names = _options(which)
    properties = {name: _option_schema(name) for name in names}
    if which == "all":
        properties |= {
            "shape": {"type": "array", "items": {"type": "integer"}, "description": "Of raw latents."},
            "dtype": {"type": "string", "description": "Of raw latents."},
        }
    return {"type": "object", "additionalProperties": False, "properties": properties, "description": "docs/options.md"}


def _responses(route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for status, answer in route.answers.items():
        response: dict[str, Any] = {"description": _DESCRIPTIONS[status]}
        if isinstance(answer, str):
            response["content"] = {answer: {"schema": {} if answer != "*/*" else BINARY}}
        elif answer is not None:
            response["content"] = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=answer.__name__)}}}
        found[str(status)] = response
    for status in sorted({*_ALWAYS, *route.problems}):
        found.setdefault(str(status), {"$ref": f"#/components/responses/{_NAMES[status]}"})
    return found


def _problem(name: str) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model="Problem")}
    return {"description": f"{name}: `code` says why.", "content": {PROBLEM_JSON: {"schema": schema}}}


_DESCRIPTIONS: Final = {
    200: "As asked.",
    201: "Made; of a submit: the job, which has ended.",
    202: "Accepted.",
    204: "Done.",
    206: "The range that was asked for.",
    303: "The job has not ended: GET the Location.",
    304: "Unchanged.",
    503: "Not now.",
}
