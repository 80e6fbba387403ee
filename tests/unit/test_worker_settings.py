"""A worker's settings read the way an operator writes them."""

from __future__ import annotations

import pytest

from broker_config.errors import ConfigurationError
from worker.settings import load_worker_settings


@pytest.mark.parametrize("text", ["demo,sd", "demo, sd,", '["demo", "sd"]'])
def test_vaes_are_read_from_commas_and_from_json(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTQ_WORKER_VAES", text)
    assert load_worker_settings(_env_file=None).vaes == ("demo", "sd")


def test_a_list_that_is_no_json_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTQ_WORKER_VAES", '["demo"')
    with pytest.raises(ConfigurationError, match="LATENTQ_WORKER_VAES"):
        load_worker_settings(_env_file=None)


def test_two_workers_never_have_one_name() -> None:
    assert load_worker_settings(_env_file=None).name != load_worker_settings(_env_file=None).name
