"""A gateway that answers a remote VAE's POST with a redirect, since its job takes longer than an answer may."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from broker_config.messages import DecodeRequest
from broker_config.settings import load_settings
from producer import DecodeClient
from producer.operations import Operations
from tests.support.processes import ROOT, environment_of
from tests.support.up import Up, free_port
from tests.support.wait import wait_until


def redirected_post(
    up: Up, path: str, *, catalog: Path, folder: Path, **request: Any
) -> tuple[requests.Response, DecodeRequest]:
    """Posts while the VAE "sd" is paused, resumes after three redirects; the last answer, and the job it became."""
    settings = load_settings(redis_url=up.broker_url, catalog=catalog, _env_file=None)
    with DecodeClient.from_url(up.broker_url, catalog=catalog, _env_file=None) as client:
        port = free_port()
        environment = environment_of(settings) | {"LATENTQ_GATEWAY_WAIT_S": "0.2", "LATENTQ_LOG_FORMAT": "json"}
        command = [sys.executable, "-m", "producer.gateway", "--port", str(port)]
        with (folder / "gateway.log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stderr=log, stdout=log, cwd=ROOT)
        url = f"http://127.0.0.1:{port}"
        operations = Operations(client)
        try:
            wait_until(lambda: _answers_at(url), timeout_s=60, what="the second gateway")
            operations.pause("sd")
            with ThreadPoolExecutor(1) as pool:
                try:
                    waiting = pool.submit(requests.post, f"{url}{path}", timeout=120, **request)
                    wait_until(lambda: _redirects(url) >= 3, timeout_s=60, what="redirects")
                finally:
                    operations.resume("sd")
                answer = waiting.result(timeout=60)
            job = client.job(answer.headers["X-Latentq-Job"]).snapshot().request
        finally:
            process.terminate()
            assert process.wait(30) == 0, (folder / "gateway.log").read_text()
    assert job is not None
    assert [step.status_code for step in answer.history[:2]] == [303, 303]
    assert answer.status_code == 200
    return answer, job


def _answers_at(url: str) -> bool:
    try:
        return requests.get(f"{url}/livez", timeout=5).ok
    except requests.ConnectionError:
        return False


def _redirects(url: str) -> float:
    """Redirects that this gateway has answered with."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    lines = [
        line for line in text.splitlines() if line.startswith("latentq_http_requests_total") and 'status="303"' in line
    ]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
