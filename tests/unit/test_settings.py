"""Settings: where they come from, what is refused, and that no secret is ever shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from broker_config.errors import ConfigurationError
from broker_config.settings import Settings, load_settings
from worker.settings import load_worker_settings


@pytest.fixture(autouse=True)
def _clean_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No `.env` of the developer is read."""
    monkeypatch.chdir(tmp_path)


# Where they come from -------------------------------------------------------------------------------------


def test_the_defaults_are_the_documented_ones() -> None:
    made = load_settings()
    assert made.redis_url is None
    assert (made.lease_s, made.lease_renew_s) == (15.0, 5.0)
    assert (made.max_errors, made.max_crashes) == (3, 3)
    assert (made.retention_s, made.tombstone_s) == (24 * 3600, 7 * 24 * 3600)
    assert (made.max_image_px, made.max_clip_px) == (64_000_000, 2_000_000_000)
    assert made.timeout_min_s == 60.0
    assert made.ageing_s == 60.0


def test_the_environment_names_them_with_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTQ_REDIS_URL", "redis://broker.example:6380/2")
    monkeypatch.setenv("LATENTQ_LEASE_S", "30")
    monkeypatch.setenv("latentq_max_errors", "5")
    monkeypatch.setenv("LEASE_RENEW_S", "1")
    made = load_settings()
    assert made.redis_url is not None
    assert made.redis_url.get_secret_value() == "redis://broker.example:6380/2"
    assert (made.lease_s, made.max_errors, made.lease_renew_s) == (30.0, 5, 5.0)


def test_an_argument_goes_before_the_environment_and_that_before_the_env_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("LATENTQ_LEASE_S=21\nLATENTQ_MAX_ERRORS=22\nLATENTQ_MAX_CRASHES=23\n")
    monkeypatch.setenv("LATENTQ_LEASE_S", "31")
    monkeypatch.setenv("LATENTQ_MAX_ERRORS", "32")
    made = load_settings(lease_s=41.0)
    assert (made.lease_s, made.max_errors, made.max_crashes) == (41.0, 32, 23)


def test_an_argument_that_is_none_leaves_the_others_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTQ_LEASE_S", "31")
    assert load_settings(lease_s=None).lease_s == 31.0


def test_an_empty_variable_is_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTQ_REDIS_URL", "")
    monkeypatch.setenv("LATENTQ_LEASE_S", "")
    made = load_settings()
    assert (made.redis_url, made.lease_s) == (None, 15.0)


def test_they_are_read_once_and_do_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_settings()
    monkeypatch.setenv("LATENTQ_LEASE_S", "31")
    assert made.lease_s == 15.0
    with pytest.raises(ValidationError, match="frozen"):
        made.lease_s = 31.0


def test_the_broker_lies_in_the_data_folder(tmp_path: Path) -> None:
    assert load_settings(data_dir=tmp_path / "data").broker_dir == tmp_path / "data" / "broker"


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_image_px", "0"),
        ("max_clip_px", "-1"),
        ("max_latents_bytes", "0"),
        ("max_latents_bytes", str(512 * 1024 * 1024 + 1)),
        ("max_metadata_bytes", "0"),
        ("max_pending_jobs", "0"),
        ("max_pending_bytes", "many"),
        ("memory_watermark", "0"),
        ("memory_watermark", "1"),
        ("lease_s", "0.2"),
        ("lease_s", "nan"),
        ("lease_renew_s", "0"),
        ("max_errors", "0"),
        ("max_crashes", "2.5"),
        ("retention_s", "0"),
        ("tombstone_s", "-1"),
        ("provisional_s", "0"),
        ("timeout_min_s", "0"),
        ("ageing_s", "0"),
        ("log_format", "yaml"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LATENTQ_{name.upper()}", value)
    with pytest.raises(ConfigurationError, match=f"LATENTQ_{name.upper()}: ") as refusal:
        load_settings()
    assert refusal.value.code == "configuration_invalid"
    assert "\n" not in refusal.value.message


def test_every_value_that_is_not_allowed_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTQ_LEASE_S", "soon")
    monkeypatch.setenv("LATENTQ_MAX_ERRORS", "0")
    with pytest.raises(ConfigurationError, match=r"LATENTQ_LEASE_S: .*; LATENTQ_MAX_ERRORS: "):
        load_settings()


@pytest.mark.parametrize(("lease_s", "renew_s", "fits"), [(15, 7.5, True), (15, 7.6, False), (2, 0.5, True)])
def test_a_lease_must_outlast_one_lost_renewal(lease_s: float, renew_s: float, *, fits: bool) -> None:
    if fits:
        assert load_settings(lease_s=lease_s, lease_renew_s=renew_s).lease_s == lease_s
    else:
        with pytest.raises(ConfigurationError, match="at most half of lease_s"):
            load_settings(lease_s=lease_s, lease_renew_s=renew_s)


# Secrets --------------------------------------------------------------------------------------------------


def test_the_password_of_the_broker_is_never_shown() -> None:
    made = load_settings(redis_url="redis://me:s3cret@broker.example/0")
    for shown in (repr(made), str(made), str(made.model_dump()), made.model_dump_json(), f"{made.redis_url}"):
        assert "s3cret" not in shown


def test_a_refusal_does_not_show_other_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTQ_REDIS_URL", "redis://me:s3cret@broker.example/0")
    monkeypatch.setenv("LATENTQ_LEASE_S", "s3cret too")
    with pytest.raises(ConfigurationError) as refusal:
        load_settings()
    assert "s3cret" not in refusal.value.message
    assert refusal.value.__suppress_context__, "the driver's own error shows the input"


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


# The worker's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float64"),
        ("mode", "quick"),
        ("threads", "0"),
        ("encode_threads", "0"),
        ("max_batch_jobs", "0"),
        ("max_batch_px", "0"),
        ("pool_bytes", "0"),
        ("grace_s", "0"),
        ("name", "a b"),
        ("name", "n" * 65),
    ],
)
def test_a_workers_value_that_is_not_allowed_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"LATENTQ_WORKER_{name.upper()}", value)
    with pytest.raises(ConfigurationError, match=f"LATENTQ_WORKER_{name.upper()}: "):
        load_worker_settings()
