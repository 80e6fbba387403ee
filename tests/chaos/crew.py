"""Processes of a storm: workers, janitors and couriers that can be killed and are started again in well under a second.

A fork server imports torch once; each worker is a fork of it that has not computed anything yet. It is a process of its
own all the same, and SIGKILL is what it is anywhere.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["worker.__main__", "worker.janitor", "worker.courier.__main__", "tests.chaos.crew"])

#: Variable with the VAE that workers serve; sd.
VAE = "LATENTQ_CHAOS_VAE"
#: `metadata` of a job whose decode kills the worker.
POISON = {"poison": "crash"}


def _enter(environment: Mapping[str, str], log: str) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def run_worker(environment: Mapping[str, str], log: str, name: str) -> None:
    """A worker process; jobs marked as poison kill it on the device, as a driver fault would."""
    _enter(environment, log)
    import torch

    from tests.support import worker_faults
    from worker import __main__ as worker_main
    from worker.batch_decode import BatchDecoder

    decode = BatchDecoder.decode

    def deadly(self: BatchDecoder, vae: object, works: object, how: object) -> None:
        if any(dict(work.request.metadata) == POISON for work in works):  # type: ignore[attr-defined]
            os._exit(139)
        decode(self, vae, works, how)  # type: ignore[arg-type]

    BatchDecoder.decode = deadly  # type: ignore[method-assign]
    worker_faults.install(environment.get(worker_faults.VARIABLE))
    torch.set_num_threads(1)
    vae = environment.get(VAE, "sd")
    sys.exit(worker_main.main(["--vae", vae, "--mode", "exact", "--threads", "1", "--name", name]))


def run_janitor(environment: Mapping[str, str], log: str, _: str) -> None:
    """A janitor process."""
    _enter(environment, log)
    from worker import janitor

    sys.exit(janitor.main([]))


def run_courier(environment: Mapping[str, str], log: str, name: str) -> None:
    """A courier process."""
    _enter(environment, log)
    from worker.courier import __main__ as courier_main

    sys.exit(courier_main.main(["--name", name]))


#: By kind of member.
_RUNS = {"worker": run_worker, "janitor": run_janitor, "courier": run_courier}


@dataclass
class Member:
    """One place in the crew: a process, and the next one when it was killed."""

    kind: str
    number: int
    environment: Mapping[str, str]
    log: Path
    #: Names of the workers that were in this place, the last one now.
    names: list[str] = field(default_factory=list)
    process: BaseProcess | None = None

    def start(self) -> None:
        """Starts the next process in this place."""
        name = f"{self.kind}-{self.number}-{len(self.names)}"
        self.names.append(name)
        self.process = _CONTEXT.Process(
            target=_RUNS[self.kind], args=(dict(self.environment), str(self.log), name), name=name
        )
        self.process.start()

    def kill(self) -> str:
        """SIGKILL. Returns the name of the one that died."""
        assert self.process is not None
        self.process.kill()
        self.process.join()
        return self.names[-1]

    def end(self) -> int | None:
        """SIGTERM, and the exit status."""
        assert self.process is not None
        self.process.terminate()
        self.process.join(60)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode

    def wait(self, timeout_s: float = 60.0) -> int | None:
        """The exit status of a process that ends by itself."""
        assert self.process is not None
        self.process.join(timeout_s)
        return self.process.exitcode

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.is_alive()
