"""A broker that does not answer, or refuses us, is named with the fix."""

from __future__ import annotations

import socket
import traceback
from pathlib import Path

import pytest
import torch

from broker_config.connection import redact
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import (
    BrokerNotRunning,
    BrokerUnreachable,
    ConfigurationError,
    LatentqError,
)
from producer import DecodeClient

# The broker -----------------------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def said(error: BaseException) -> str:
    """Everything a log would show of an error."""
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize("form", ["redis://me:s3cret@{host}/0", "redis://:s3cret@{host}/0?client_name=s3cret"])
def test_a_broker_that_does_not_answer(closed_port: int, form: str) -> None:
    with (
        DecodeClient.from_url(form.format(host=f"127.0.0.1:{closed_port}")) as client,
        pytest.raises(BrokerUnreachable) as refusal,
    ):
        client.submit(torch.zeros(1, 16, 8, 8), vae="flux", job_id="mine")
    error = refusal.value
    assert (error.code, error.retryable, error.job_id) == ("broker_unreachable", True, "mine")
    assert f"redis://127.0.0.1:{closed_port}/0 " in error.message
    assert "latentq up" in error.message
    assert "LATENTQ_REDIS_URL" in error.message
    assert "\n" not in error.message
    assert "s3cret" not in said(error)


def test_a_broker_that_refuses_the_login(broker_server: EmbeddedBroker) -> None:
    url = broker_server.url.replace("unix://", "unix://me:s3cret@")
    with DecodeClient.from_url(url) as client, pytest.raises(BrokerUnreachable) as refusal:
        client.ping()
    assert "user and password" in refusal.value.message
    assert "s3cret" not in said(refusal.value)


@pytest.mark.parametrize("url", ["http://me:s3cret@localhost/0", "localhost:6379", "redis://me:s3cret@localhost:x/0"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        DecodeClient.from_url(url)
    assert refusal.value.code == "configuration_invalid"
    assert "redis://host:6379/0" in refusal.value.message
    assert "s3cret" not in said(refusal.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0?password=p@s3cret", "redis://host:6379/0"),
        ("redis://me@host/0?db=1&password=p@s3cret", "redis://host/0"),
        ("unix:///run/redis.sock?db=0&password=p@s3cret", "unix:///run/redis.sock"),
        ("rediss://[::1]:6380?client_name=a@s3cret", "rediss://[::1]:6380"),
        ("unix://me:s3cret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("redis://:p@s3cret?x@host/0", "redis://host/0"),
        ("redis://:s3cret?x=1@host/0", "redis://host/0"),
        ("me:s3cret@host", "host"),
        ("localhost:6379", "localhost:6379"),
    ],
)
def test_an_address_is_shown_without_what_is_said_besides_it(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.parametrize("sign", list("/#?[]@:%"))
@pytest.mark.parametrize("form", ["redis://:s3cret{}t41l@localhost:1/0", "redis://me:41{}s3cret@localhost:1/0"])
def test_no_sign_of_a_password_brings_it_to_light(form: str, sign: str) -> None:
    """Base64 has slashes. Written as a URL has them, they would be %2F."""
    with pytest.raises(LatentqError) as refusal, DecodeClient.from_url(form.format(sign)) as client:
        client.ping()
    assert refusal.value.code in ("configuration_invalid", "broker_unreachable")
    if refusal.value.code == "configuration_invalid":
        assert "%2F" in refusal.value.message
    assert "redis://localhost:1/0" in refusal.value.message
    for part in ("s3cret", "t41l", "41"):
        assert part not in refusal.value.message
    assert "s3cret" not in said(refusal.value)


def test_no_broker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BrokerNotRunning) as refusal:
        DecodeClient.from_env(data_dir=tmp_path / "data")
    assert (refusal.value.code, refusal.value.retryable) == ("broker_not_running", True)
    assert "latentq up" in refusal.value.message
    assert "LATENTQ_REDIS_URL" in refusal.value.message
    assert not (tmp_path / "data").exists(), "looking for a broker makes no folder"
