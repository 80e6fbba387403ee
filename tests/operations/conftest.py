"""Jobs in every state, made in this process: no worker runs, so nothing here loads torch or waits for a decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from typer.testing import CliRunner, Result

from broker_config.blob_store import RedisBlobStore
from broker_config.claims import Claim
from broker_config.decode_result import Artifact, DecodeResult
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.job_store import JobStore
from broker_config.settings import Settings, load_settings
from producer import DecodeClient
from producer.cli import app
from producer.doctor import Finding, Level, diagnose

LATENTS = np.zeros((1, 4, 2, 2), dtype=np.float32)


@pytest.fixture
def settings(broker_url: str) -> Settings:
    """Settings of a test: our own catalogue, short leases."""
    return load_settings(redis_url=broker_url, lease_s=2.0, lease_renew_s=0.5, _env_file=None)


@pytest.fixture
def admin(broker_url: str) -> Iterator[redis.Redis]:
    """A bare connection, for what no client of ours does."""
    with redis.Redis.from_url(broker_url) as opened:
        yield opened


Run = Callable[..., Result]


@pytest.fixture
def cli(broker_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a `latentq` command against the test's broker: `cli("purge", "sdxl", input="n")`."""
    monkeypatch.setenv("LATENTQ_REDIS_URL", broker_url)
    monkeypatch.chdir(tmp_path)  # no `.env` of the developer's

    def run(*arguments: str, columns: int | None = 120, text: str | None = None) -> Result:
        """`columns`: width of the terminal; None: a pipe. `text`: standard input."""
        if columns is None:
            monkeypatch.delenv("COLUMNS", raising=False)
        else:
            monkeypatch.setenv("COLUMNS", str(columns))
        return CliRunner().invoke(app, list(arguments), input=text)

    return run


@pytest.fixture
def broker_set(broker_server: EmbeddedBroker) -> Iterator[Callable[[str, str], None]]:
    """`CONFIG SET`, taken back after the test."""
    before: dict[str, str] = {}
    with redis.Redis.from_url(broker_server.url) as admin:

        def change(name: str, value: str) -> None:
            before.setdefault(name, admin.config_get(name)[name])
            admin.config_set(name, value)

        yield change
        for name, value in before.items():
            admin.config_set(name, value)


class Made:
    """Makes jobs and takes them from state to state, as a producer and a worker would."""

    def __init__(self, client: DecodeClient) -> None:
        self._client = client
        self._blobs = RedisBlobStore(client.store.connections, provisional_s=60)
        self._tokens = 0

    def queued(self, job_id: str, vae: str = "sdxl", **options: Any) -> str:
        """A job that waits."""
        return self._client.submit(LATENTS, vae=vae, job_id=job_id, **options).id

    def claimed(self, vae: str = "sdxl", *, worker: str = "worker-1") -> Claim:
        """The next job of `vae`, now processing."""
        self._tokens += 1
        (claim,) = self._client.store.claim(token=f"token-{self._tokens}", worker=worker, vaes=[vae])
        return claim

    def processing(self, job_id: str, vae: str = "sdxl", **options: Any) -> Claim:
        """A job that a worker holds; nothing else of its VAE may wait."""
        self.queued(job_id, vae, **options)
        claim = self.claimed(vae)
        assert claim.job_id == job_id
        return claim

    def failed(self, job_id: str, vae: str = "sdxl", *, code: str = "decode_failed", **options: Any) -> str:
        """A job that ended with an error."""
        claim = self.processing(job_id, vae, **options)
        error = {"code": code, "message": f"it said {code}", "attempt": 1}
        self._client.store.fail(claim, error, retryable=False, traceback="Traceback …")
        return job_id

    def succeeded(self, job_id: str, vae: str = "sdxl", **options: Any) -> str:
        """A job with a result."""
        claim = self.processing(job_id, vae, **options)
        blob = self._blobs.put(f"{job_id}.out", b"a picture")
        artifact = Artifact(blob=blob, content_type="image/png", extension="png")
        result = DecodeResult(artifacts=(artifact,), timings_s={"decode": 0.5}, decoded_by={"vae": vae})
        self._client.store.complete(claim, result)
        return job_id

    def canceled(self, job_id: str, vae: str = "sdxl") -> str:
        """A job that was canceled while it waited."""
        self.queued(job_id, vae)
        self._client.job(job_id).cancel()
        return job_id

    def serving(self, worker: str, *vaes: str, **report: Any) -> None:
        """A live worker, as far as the broker knows."""
        told = {"busy_s": 30.0, "idle_s": 10.0, "jobs": 7, "vaes": vaes, "device": "cuda:0", "pid": 4711, "held": 2}
        self._client.store.serve(worker, vaes, ttl_s=60, report=told | report)


@pytest.fixture
def made(client: DecodeClient) -> Made:
    """Makes jobs in every state."""
    return Made(client)


def parsed(result: Result) -> Any:
    """What a command printed as JSON."""
    return json.loads(result.stdout)


#: What the doctor says in one check: `finding("aof")`.
Of = Callable[..., Finding]


@pytest.fixture
def finding(settings: Settings) -> Callable[..., Finding]:
    """What the doctor says in one check: `finding("aof")`."""

    def one(check: str, **options: Any) -> Finding:
        (found,) = [item for item in diagnose(settings, **options).findings if item.check == check]
        assert (found.fix is None) == (found.level is Level.OK), "a finding that is not ok comes with a fix"
        return found

    return one


@pytest.fixture
def janitor(store: JobStore) -> str:
    """A janitor that leads and has just looked at the leases."""
    store.lead("janitor-1", ttl_s=60)
    store.reap("janitor-1", quiet_s=10)
    return "janitor-1"
