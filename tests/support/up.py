"""`latentq up` as a process of its own, with its gateway."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from broker_config.broker_folder import find_running
from tests.support.processes import ROOT
from tests.support.wait import wait_until

_PROGRAM = "import sys; from producer.cli import main; sys.argv[0] = 'latentq'; main()"


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Up:
    """A running stack."""

    #: Of the gateway, without a slash at the end.
    url: str
    #: Of the broker.
    broker_url: str
    environment: Mapping[str, str]
    folder: Path


def environment_for(folder: Path, **more: str) -> dict[str, str]:
    """Environment of a process that has its data in `folder` and no settings of the developer's."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LATENTQ_")}
    return clean | {
        "LATENTQ_DATA_DIR": str(folder / "data"),
        "LATENTQ_LOG_FORMAT": "json",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **more,
    }


@contextlib.contextmanager
def latentq_up(folder: Path, *, vaes: Sequence[str], **more: str) -> Iterator[Up]:
    """`latentq up` for these VAEs, once its worker serves them. `more`: environment."""
    port = free_port()
    environment = environment_for(folder, LATENTQ_GATEWAY_PORT=str(port), **more)
    command = [sys.executable, "-c", _PROGRAM, "up", *(part for vae in vaes for part in ("--vae", vae))]
    url = f"http://127.0.0.1:{port}"
    with (folder / "up.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:

        def served() -> bool:
            assert process.poll() is None, (folder / "up.log").read_text()
            try:
                with urllib.request.urlopen(f"{url}/v1/vaes", timeout=10) as answer:
                    return {vae["name"] for vae in json.load(answer)["vaes"] if vae["served"]} >= set(vaes)
            except (URLError, ConnectionError, TimeoutError):
                return False

        wait_until(served, timeout_s=120, what="latentq up")
        state = find_running(folder / "data" / "broker")
        assert state is not None
        yield Up(url=url, broker_url=state.url, environment=environment, folder=folder)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(60) == 0, (folder / "up.log").read_text()
        finally:
            process.kill()
