"""Reading messages that are newer, damaged, or none."""

from __future__ import annotations

from typing import Any

import pytest

from broker_config.errors import UnsupportedMessage
from broker_config.messages import (
    SCHEMA_VERSION,
    DecodeRequest,
)
from tests.support.example_messages import REQUEST, wire_of


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 999])
def test_a_newer_version_is_told_apart_and_says_to_upgrade(version: int) -> None:
    with pytest.raises(
        UnsupportedMessage, match=f"schema_version is {version}.* up to {SCHEMA_VERSION}: upgrade"
    ) as refusal:
        DecodeRequest.from_wire(wire_of(schema_version=version))
    assert refusal.value.code == "unsupported_message"


@pytest.mark.parametrize("version", [None, "1", 1.5, [1]])
def test_a_version_that_is_none_is_refused(version: Any) -> None:
    with pytest.raises(UnsupportedMessage):
        DecodeRequest.from_wire(wire_of(schema_version=version))


def test_a_field_that_a_reader_does_not_know_is_ignored() -> None:
    assert DecodeRequest.from_wire(wire_of(a_field_of_tomorrow={"x": 1})) == REQUEST


def test_a_field_that_is_not_there_takes_its_default() -> None:
    optional = {"priority", "timeout_s", "retention_s", "provenance", "allow_tiling"}
    assert DecodeRequest.from_wire(wire_of(**dict.fromkeys(optional, ...))) == REQUEST


@pytest.mark.parametrize(
    "name",
    ["schema_version", "job_id", "vae", "layout", "latents", "shape", "dtype", "height", "batch", "fps", "output"],
)
def test_a_required_field_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedMessage):
        DecodeRequest.from_wire(wire_of(**{name: ...}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latents", "redis"),
        ("latents", {"store": "redis"}),
        ("latents", {"store": "redis", "name": "x", "sha256": "", "size_bytes": 1, "path": "/etc/passwd"}),
        ("shape", 4),
        ("shape", ["four"]),
        ("output", "gif"),
        ("mode", "quick"),
        ("priority", "urgent"),
        ("job_id", 7),
        ("vae", None),
        ("height", "64"),
        ("width", None),
        ("batch", [2]),
        ("num_frames", 1.5),
        ("fps", "8"),
        ("timeout_s", "soon"),
        ("metadata", "seed=1"),
        ("metadata", {"seed": 1}),
        ("provenance", "no"),
    ],
)
def test_a_field_of_a_wrong_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedMessage):
        DecodeRequest.from_wire(wire_of(**{name: value}))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"7", b'"text"', b"\xff\xfe", "{}", b"{}"])
def test_what_is_no_message_is_refused(data: bytes | str) -> None:
    with pytest.raises(UnsupportedMessage):
        DecodeRequest.from_wire(data)
