"""A real `DecodeWorker` in a thread of the test's process, whose decodes the test can watch, hold and break."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from broker_config.connection import connect_url
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog
from worker.decode_worker import DecodeWorker
from worker.settings import load_worker_settings
from worker.vae_pool import LoadedVae


class Gate:
    """Stands before each call of the VAE: notes it, holds it while closed, and may raise."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        #: Set when a decode has come to the gate.
        self.reached = threading.Event()
        #: Shape of the input of each call.
        self.calls: list[tuple[int, ...]] = []
        #: Called with the input before the VAE; raise from it to break the decode.
        self.on_call: Callable[[torch.Tensor], None] = lambda _: None

    def close(self) -> None:
        """Holds the next decode."""
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        """Lets what is held go on."""
        self._open.set()

    def pass_through(self, latents: torch.Tensor) -> None:
        """What a decode does at the gate; the first one of a VAE, which warms it up, is no job and goes through."""
        if threading.current_thread().name != "device":
            return
        self.calls.append(tuple(latents.shape))
        self.reached.set()
        assert self._open.wait(60), "the gate was never opened"
        self.on_call(latents)


def stage_threads() -> list[str]:
    """Threads of workers that still live."""
    return [thread.name for thread in threading.enumerate() if thread.name in ("fetch", "device", "leases")]


class ThreadWorker:
    """Runs a worker inside the `with` block."""

    def __init__(self, settings: Settings, *, vaes: Sequence[str] = ("sd",), **own: Any) -> None:
        assert settings.redis_url is not None
        self.gate = Gate()
        self.connections = connect_url(settings.redis_url.get_secret_value(), name="thread-worker", retries=1)
        self.worker = DecodeWorker(
            self.connections,
            settings=settings,
            # measured budgets differ from machine to machine
            worker_settings=load_worker_settings(vaes=tuple(vaes), _env_file=None, **({"max_batch_px": 1 << 20} | own)),
            catalog=VaeCatalog.load(settings.catalog),
        )
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run, name="worker-under-test")
        self._get = self.worker.pool.get
        self.worker.pool.get = self._gated_get  # type: ignore[method-assign]
        for name in vaes:
            self.worker.pool.get(name)

    def _gated_get(self, name: str) -> LoadedVae:
        """What the pool gives, with a gate; a VAE that was evicted and loaded again gets one, too."""
        vae = self._get(name)
        if "decode" not in vars(vae.module):
            self._hang_gate(vae.module)
        return vae

    def _hang_gate(self, vae: Any) -> None:
        decode = vae.decode

        def gated(latents: torch.Tensor, **options: Any) -> Any:
            self.gate.pass_through(latents)
            return decode(latents, **options)

        vae.decode = gated

    def _run(self) -> None:
        self.status = self.worker.run()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> int | None:
        """Stops the worker and returns its exit status."""
        self.worker.stop()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the worker does not stop"
        return self.status

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gate.open()
        self.stop()
        self.connections.close()
