"""The OpenAPI document is one, names every route, and says nothing that the gateway does not do (schemathesis)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from broker_config.embedded_broker import EmbeddedBroker
from broker_config.job_status import JobStatus
from broker_config.settings import load_settings
from producer.gateway.openapi import document
from producer.gateway.query import OPTIONS
from producer.gateway.routes import ROUTES
from tests.gateway.conftest import SAFETENSORS, safetensors
from tests.support.gateways import RunningGateway

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway with a job, for what needs one."""
    with EmbeddedBroker(tmp_path_factory.mktemp("broker"), max_memory_bytes=128 << 20) as broker:
        made = load_settings(redis_url=broker.url, max_latents_bytes=64 * 1024, _env_file=None)
        with RunningGateway(made, wait_s=0.05, max_streams=10_000) as running:
            running.ask("PUT", "/v1/decodes/known", params={"vae": "sd"}, data=safetensors(), headers=SAFETENSORS)
            yield running


def test_the_document_has_every_route_and_every_option() -> None:
    told = document()
    assert told["openapi"] == "3.1.0"
    expected = {(route.path, route.method.lower()) for route in ROUTES if not route.hidden}
    assert {(path, method) for path, methods in told["paths"].items() for method in methods} == expected
    options = told["components"]["schemas"]["Options"]["properties"]
    assert set(options) == {*OPTIONS, "shape", "dtype"}
    assert [name for name, schema in options.items() if not schema["description"].endswith(".")] == []
    names = [operation["operationId"] for methods in told["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


def test_every_schema_is_a_schema_and_every_reference_leads_somewhere() -> None:
    told = document()
    for schema in told["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for reference in set(re.findall(r"'\$ref': '#/([^']+)'", str(told))):
        found: Any = told
        for part in reference.split("/"):
            found = found[part]


def test_every_route_is_in_the_docs() -> None:
    page = (DOCS / "gateway.md").read_text(encoding="utf-8")
    missing = [f"{route.method} {route.path}" for route in ROUTES if f"`{route.method} {route.path}`" not in page]
    assert missing == []


@schemathesis.serializer("application/vnd.safetensors", "tensor/binary", "image/png", "image/jpeg", "image/webp")
def as_bytes(context: object, value: Any) -> bytes:
    """Bodies that are bytes."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


@schemathesis.serializer("tensor/base64")
def as_json(context: object, value: Any) -> bytes:
    """Bodies that are JSON by another name."""
    return json.dumps(value, default=str).encode()


schema = schemathesis.openapi.from_dict(document())
#: Of each operation; more, now and then: `FUZZ_EXAMPLES=500 pytest tests/gateway/test_openapi.py`.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@pytest.mark.timeout(max(300, 4 * EXAMPLES))
def test_what_it_answers_is_documented(case: Any, shared: RunningGateway) -> None:
    if "id" in (case.path_parameters or {}):
        case.path_parameters["id"] = "known"
    if case.path.endswith("/events"):
        answer = first_event(case, shared)
    else:
        answer = case.call(base_url=shared.url, timeout=30, allow_redirects=False)
    if answer is None or (case.path == "/readyz" and answer.status_code == 503):
        return
    case.validate_response(
        answer,
        checks=[not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance],
    )


def first_event(case: Any, shared: RunningGateway) -> requests.Response | None:
    """The refusal of a stream; None: it began, as the document says. It does not end by itself, so it is left."""
    asked = case.as_transport_kwargs(base_url=shared.url)
    with requests.request(**asked, stream=True, timeout=30) as answer:
        if answer.status_code != 200:
            return answer if answer.content is not None else None
        documented = case.operation.definition.raw["responses"]["200"]["content"]
        assert answer.headers["Content-Type"] in documented
        lines = answer.iter_lines()
        event = next(line for line in lines if line.startswith(b"event: "))
        assert event.removeprefix(b"event: ").decode() in {*JobStatus, "overview"}
        assert isinstance(json.loads(next(lines).removeprefix(b"data: ")), dict)
        return None
