"""A real S3 API over HTTP on loopback: moto's server, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from types import TracebackType
from typing import Final, Self

import pytest

#: Says its port, then serves until its standard input ends (with the test process, however that ends).
_SERVE: Final = """
import logging, sys
logging.disable(logging.CRITICAL)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
_TIMEOUT_S: Final = 30.0

ACCESS_KEY: Final = "AKIATESTTESTTEST"
SECRET_KEY: Final = "a-secret-that-must-not-be-printed"


class S3Server:
    """The server; use it as a context manager."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        #: `http://127.0.0.1:port`.
        self.endpoint = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "moto's server did not start: pip install 'moto[s3]' flask flask-cors"
        self.endpoint = f"http://127.0.0.1:{int(line)}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def make_bucket(self, name: str) -> None:
        """An empty bucket; nothing is left of one of that name."""
        self._ask("PUT", name)

    def keys(self, bucket: str) -> set[str]:
        """What lies in a bucket, asked for without obstore."""
        text = self._ask("GET", f"{bucket}?list-type=2")
        return {part.partition("</Key>")[0] for part in text.split("<Key>")[1:]}

    def overwrite(self, bucket: str, key: str, data: bytes) -> None:
        """Replaces an object's bytes."""
        self._ask("PUT", f"{bucket}/{key}", data)

    def _ask(self, method: str, path: str, data: bytes | None = None) -> str:
        request = urllib.request.Request(f"{self.endpoint}/{path}", method=method, data=data)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode())


def need_s3() -> None:
    """Without obstore or moto the test is skipped on a laptop and fails in CI."""
    for module in ("obstore", "moto", "flask_cors"):
        if os.environ.get("CI") == "true":
            __import__(module)
        else:
            pytest.importorskip(module)
