"""The job API takes every fact that a layout needs, in a URL and in a form, and the job carries it."""

from __future__ import annotations

import json

import pytest

from broker_config.job_store import JobStore
from tests.gateway.conftest import SAFETENSORS, latents, problem, safetensors
from tests.support.gateways import RunningGateway
from tests.support.latent_facts import CASES
from tests.support.store_worker import StoreWorker


def carried(worker: StoreWorker, job_id: str, said: dict[str, object]) -> dict[str, object]:
    """What the job says of `said`."""
    store: JobStore = worker.store
    request = store.snapshot(job_id).request
    assert request is not None
    return {name: getattr(request, name) for name in said}


@pytest.mark.parametrize("name", CASES)
def test_a_fact_in_the_url_is_in_the_job(name: str, gateway: RunningGateway, worker: StoreWorker) -> None:
    said = dict(CASES[name].said)
    query = {key: str(value) for key, value in said.items()}
    body = safetensors(latents(*CASES[name].shape))
    answer = gateway.ask("POST", "/v1/decodes", params=query, data=body, headers=SAFETENSORS)
    assert answer.status_code == 202, answer.text
    assert carried(worker, answer.json()["id"], said) == said


@pytest.mark.parametrize("name", CASES)
def test_a_fact_in_a_form_is_in_the_job(name: str, gateway: RunningGateway, worker: StoreWorker) -> None:
    said = dict(CASES[name].said)
    form = {
        "options": (None, json.dumps(said), "application/json"),
        "latents": ("latents.safetensors", safetensors(latents(*CASES[name].shape)), "application/vnd.safetensors"),
    }
    answer = gateway.ask("POST", "/v1/decodes", files=form)
    assert answer.status_code == 202, answer.text
    assert carried(worker, answer.json()["id"], said) == said


def test_a_seed_that_no_generator_takes_is_refused(gateway: RunningGateway) -> None:
    said = {"vae": "ltx", "layout": "video", "decode_timestep": "0.05", "seed": str(2**64)}
    body = safetensors(latents(1, 128, 2, 6, 8))
    answer = gateway.ask("POST", "/v1/decodes", params=said, data=body, headers=SAFETENSORS)
    assert problem(answer) == (422, "invalid_option")
