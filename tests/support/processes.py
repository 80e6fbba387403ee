"""Worker processes of a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import redis
from pydantic import SecretStr

from broker_config import keys
from broker_config.settings import Settings
from tests.support.wait import wait_until

ROOT = Path(__file__).parents[2]


def environment_of(settings: Settings) -> dict[str, str]:
    """Environment in which a process has these settings."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LATENTQ_")}
    assert settings.redis_url is not None
    environment["LATENTQ_REDIS_URL"] = settings.redis_url.get_secret_value()
    for name in settings.model_fields_set - {"redis_url"}:
        value = getattr(settings, name)
        if value is not None:
            text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            text = ",".join(str(item) for item in value) if isinstance(value, tuple) else text
            environment[f"LATENTQ_{name.upper()}"] = text
    environment["PYTHONPATH"] = str(ROOT)
    environment["OMP_NUM_THREADS"] = "1"
    environment["HF_HUB_OFFLINE"] = "1"
    return environment


class WorkerProcesses:
    """`python -m worker` processes, ended with the test."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started: list[subprocess.Popen[bytes]] = []
        self._logs: dict[int, Path] = {}

    def start(
        self,
        *vaes: str,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        ready: bool = True,
    ) -> subprocess.Popen[bytes]:
        """Starts a worker for these VAEs and waits until it serves them."""
        name = f"test-worker-{os.getpid()}-{len(self._started)}"
        command = [sys.executable, "-m", "worker", "--name", name, *arguments]
        for vae in vaes:
            command += ["--vae", vae]
        with tempfile.NamedTemporaryFile(prefix="latentq-worker-", suffix=".log", delete=False) as log:
            process = subprocess.Popen(
                command, env=environment_of(self._settings) | dict(environment or {}), stderr=log, cwd=ROOT
            )
        self._started.append(process)
        self._logs[process.pid] = Path(log.name)
        if ready:
            self._wait_ready(process, name)
        return process

    def log(self, process: subprocess.Popen[bytes]) -> str:
        """What the worker has logged so far."""
        return self._logs[process.pid].read_text()

    def _wait_ready(self, process: subprocess.Popen[bytes], name: str) -> None:
        assert self._settings.redis_url is not None
        with redis.Redis.from_url(self._settings.redis_url.get_secret_value()) as admin:

            def serving() -> bool:
                assert process.poll() is None, self.log(process)
                return bool(admin.exists(keys.worker(name)))

            wait_until(serving, timeout_s=300, what=f"{name} to be ready")

    def stop_all(self) -> None:
        """Ends what still runs, with SIGTERM, and reaps everything."""
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self._started:
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for path in self._logs.values():
            path.unlink(missing_ok=True)
