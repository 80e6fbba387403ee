"""Everything on one machine: the embedded broker (unless a URL is set), and the services as processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import redis

from broker_config.connection import Connections, broker_errors, connect_url, redact
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import ConfigurationError
from broker_config.exit_status import EXIT_UNUSABLE
from broker_config.settings import Settings
from broker_config.supported_servers import verify_server
from producer.kept_broker import KeptBroker
from producer.supervisor import Supervisor, sharing_cores

_WATCH_S = 0.3
NEEDED_FOR_WEBHOOKS: Final = "LATENTQ_PUBLIC_URL and LATENTQ_LINK_KEY"


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayAddress:
    """Where a gateway listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """What a browser takes."""
        return f"http://[{self.host}]:{self.port}/" if ":" in self.host else f"http://{self.host}:{self.port}/"


class LocalStack:
    """The processes behind `latentq up` and `latentq demo`."""

    def __init__(
        self,
        settings: Settings,
        *,
        vaes: tuple[str, ...],
        device: str | None = None,
        workers: int = 1,
        gateway: GatewayAddress | None = None,
    ) -> None:
        """Args:
        settings: `redis_url` set: that broker is used and none is started.
        vaes: catalogue entries that the workers serve.
        device: of the workers; None: their own choice.
        workers: how many.
        gateway: where the gateway listens; None: there is none.
        """
        self._settings = settings
        self._vaes = vaes
        self._device = device
        self._workers = workers
        self._gateway = gateway
        self._supervisor = Supervisor()
        self._broker: KeptBroker | None = None
        self._stop = threading.Event()
        #: Known once it runs.
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Connections]:
        """Starts everything; ends it with the block. Call it from the main thread: the broker follows the thread.

        Raises:
            ConfigurationError: no broker can be started, or the one configured cannot be used.
            BrokerUnreachable: the one configured does not answer.
        """
        with contextlib.ExitStack() as stack:
            if self._settings.redis_url is not None:
                self.url = self._settings.redis_url.get_secret_value()
            else:
                broker = EmbeddedBroker(
                    self._settings.broker_dir,
                    binary=self._settings.redis_server,
                    should_stop=self._stop.is_set,  # its data may take minutes to read
                )
                self.url = stack.enter_context(broker).url
                self._broker = KeptBroker(broker)
            connections = connect_url(self.url, name="latentq-up")
            stack.callback(connections.close)
            self._verify(connections.commands)
            stack.callback(self._supervisor.stop)
            self._start_processes()
            yield connections

    def check(self) -> None:
        """Starts again what ended.

        Raises:
            ConfigurationError: a process cannot work as configured; it has said why.
        """
        broken = self._check()
        if broken is not None:
            raise ConfigurationError(f"{broken} cannot run as configured; it has said why above")

    def run_until_stopped(self, *, announce: Callable[[str], None]) -> int:
        """Runs until SIGTERM or SIGINT. Returns the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        with self.running():
            announce(f"broker   {redact(self.url)}")
            announce(f"worker   {self._workers} × {', '.join(self._vaes)}")
            announce("janitor  1")
            if self._gateway is not None:
                announce(f"gateway  {self._gateway.url}")
            announce(f"courier  {'1' if self._delivers else 'none: webhooks need ' + NEEDED_FOR_WEBHOOKS}")
            announce("stop with Ctrl-C")
            while not self._stop.wait(_WATCH_S):
                broken = self._check()
                if broken is not None:
                    announce(f"{broken} cannot run as configured; stopping")
                    return EXIT_UNUSABLE
            announce("stopping: what is being decoded is finished, the rest stays in the queue")
        return 0

    def _check(self) -> str | None:
        """Starts again what ended. Returns the name of a process that cannot work as configured, else None."""
        if self._broker is not None:
            self._broker.check()
        return self._supervisor.check()

    @property
    def _delivers(self) -> bool:
        """Whether there can be webhooks."""
        return self._settings.public_url is not None and bool(self._settings.link_keys)

    def _verify(self, client: redis.Redis) -> None:
        with broker_errors(redact(self.url)):
            verify_server(client)

    def _start_processes(self) -> None:
        environment = {"LATENTQ_REDIS_URL": self.url}
        self._supervisor.start("janitor", [sys.executable, "-m", "worker.janitor"], environment=environment)
        if self._delivers:
            self._supervisor.start("courier", [sys.executable, "-m", "worker.courier"], environment=environment)
        if self._gateway is not None:
            command = [sys.executable, "-m", "producer.gateway"]
            command += ["--host", self._gateway.host, "--port", str(self._gateway.port)]
            self._supervisor.start("gateway", command, environment=environment)
        for number in range(self._workers):
            command = [sys.executable, "-m", "worker"]
            for vae in self._vaes:
                command += ["--vae", vae]
            if self._device:
                command += ["--device", self._device]
            own = dict(environment)
            if self._workers > 1 and (name := os.environ.get("LATENTQ_WORKER_NAME")):
                own["LATENTQ_WORKER_NAME"] = f"{name}-{number + 1}"  # each needs one of its own
            self._supervisor.start(f"worker {number + 1}", command, environment=sharing_cores({**os.environ, **own}))
