"""`latentq webhooks …` and `latentq courier`, as people type them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from broker_config.settings import Settings
from broker_config.webhook_deliveries import DeliveryState, WebhookDeliveries, delivery_id
from broker_config.webhook_secrets import read_secrets
from broker_config.webhooks import WebhookEvent
from producer import DecodeClient, JobHandle
from producer.cli import app
from tests.support.processes import environment_of
from tests.support.receivers import SECRET, CourierThread, Receiver, status
from tests.support.wait import wait_until

Run = Callable[..., Result]
End = Callable[..., JobHandle]


@pytest.fixture
def cli(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command with the test's settings."""
    for name, value in environment_of(settings).items():
        if name.startswith("LATENTQ_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_dead_letters_are_listed_shown_and_sent_again(
    cli: Run, ended: End, receiver: Receiver, courier: CourierThread, deliveries: WebhookDeliveries
) -> None:
    receiver.answer = status(410)
    job = ended(receiver.url)
    name = delivery_id(job.id, WebhookEvent.SUCCEEDED)
    wait_until(lambda: deliveries.show(name).state is DeliveryState.DEAD, what="the dead letter")
    listed = cli("webhooks", "list")
    assert name in listed.stdout
    assert f"stopped: {receiver.url}" in listed.stderr
    assert [item["id"] for item in json.loads(cli("webhooks", "list", "--json").stdout)] == [name]
    shown = cli("webhooks", "show", name).stdout
    assert "410 gone: this endpoint wants no more" in shown
    assert json.loads(cli("webhooks", "show", name, "--json").stdout)["attempts"][0]["status"] == 410

    receiver.answer = status(200)
    assert cli("webhooks", "enable", receiver.url).stdout.startswith("enabled")
    assert cli("webhooks", "redeliver", "--all").stdout == "1 are sent again\n"
    wait_until(lambda: deliveries.show(name).state is DeliveryState.DELIVERED, what="the delivery")
    assert cli("webhooks", "redeliver", name).stdout == "it is sent again\n"
    assert cli("webhooks", "redeliver").exit_code == 2
    unknown = cli("webhooks", "show", "msg_nobody_succeeded")
    assert getattr(unknown.exception, "code", None) == "delivery_not_found"


def test_a_receiver_is_pinged_and_the_exit_status_says_how_it_went(
    cli: Run, receiver: Receiver, courier: CourierThread
) -> None:
    assert cli("webhooks", "secrets", "add").exit_code == 0
    good = cli("webhooks", "ping", receiver.url)
    assert (good.exit_code, "204" in good.stdout) == (0, True)
    receiver.answer = status(500)
    bad = cli("webhooks", "ping", receiver.url)
    assert (bad.exit_code, "500 not 2xx" in bad.stdout) == (1, True)
    refused = cli("webhooks", "ping", "https://192.168.1.1/")
    assert getattr(refused.exception, "code", None) == "webhook_address_refused"


def test_a_secret_is_shown_once_and_listed_by_its_id(cli: Run, tmp_path: Path) -> None:
    added = cli("webhooks", "secrets", "add", "--key", "abcdefgh")
    (secret,) = read_secrets(added.stdout.strip())
    listed = cli("webhooks", "secrets", "list", "--key", "abcdefgh").stdout
    assert secret not in listed
    (secret_id,) = re.findall(r"^([0-9a-f]{8})  made", listed, flags=re.MULTILINE)
    assert "no secrets" in cli("webhooks", "secrets", "list").stderr

    (tmp_path / "mine").write_text(SECRET + "\n")
    mine = cli("webhooks", "secrets", "add", "--key", "abcdefgh", "--file", "mine")
    assert SECRET not in mine.stdout + mine.stderr
    assert len(cli("webhooks", "secrets", "list", "--key", "abcdefgh").stdout.splitlines()) == 2
    assert cli("webhooks", "secrets", "remove", secret_id, "--key", "abcdefgh").stdout == "removed\n"
    assert secret_id not in cli("webhooks", "secrets", "list", "--key", "abcdefgh").stdout


def test_older_secrets_sign_on_for_a_year_at_most(cli: Run) -> None:
    assert cli("webhooks", "secrets", "add", "--overlap", "31536000").exit_code == 0
    assert cli("webhooks", "secrets", "add", "--overlap", "1e12").exit_code == 2


def test_a_job_is_submitted_with_a_webhook_and_its_secret_from_a_file(
    cli: Run, client: DecodeClient, tmp_path: Path
) -> None:
    from safetensors.numpy import save_file

    from tests.webhooks.conftest import LATENTS

    save_file({"latents": LATENTS}, tmp_path / "cat.safetensors")
    (tmp_path / "secret").write_text(SECRET)
    done = cli(
        "submit", "cat.safetensors", "--vae", "sd", "--webhook", "https://hooks.example/1",
        "--webhook-events", "failed,succeeded", "--webhook-inline", "--webhook-secret-file", "secret",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    request = client.job(done.stdout.strip()).snapshot().request
    assert request is not None
    assert request.webhook is not None
    assert request.webhook.events == (WebhookEvent.SUCCEEDED, WebhookEvent.FAILED)
    assert request.webhook.inline
    assert request.retention_s == 36 * 3600


def test_a_courier_that_cannot_make_links_does_not_start_and_says_what_is_missing(settings: Settings) -> None:
    without = settings.model_copy(update={"link_key": None})
    done = subprocess.run(
        [sys.executable, "-m", "worker.courier"],
        env=environment_of(without),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "LATENTQ_LINK_KEY" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_link_key_that_is_too_short_is_refused_and_not_repeated(settings: Settings) -> None:
    with pytest.raises(ValueError, match="fewer than 32 characters") as caught:
        Settings.model_validate(settings.model_dump() | {"link_key": SecretStr("hunter2")})
    assert "hunter2" not in str(caught.value)
