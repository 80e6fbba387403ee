"""`python -m producer.prompt_farm.generator_process`: one device's generator as a process of its own.

Lines of JSON go in and out. In: what to load, then options of the submits, then batches, one at a time. Out: `ready`
with the pipeline's facts; then events, and `turn` whenever a batch is done with. `refused` has the error that ends the
process: it cannot load the pipeline, or has lost its device. The end of the input, or SIGTERM, ends it once what it is
denoising is handed over. Standard output belongs to the lines alone: what libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Final

from broker_config.errors import DenoiseFailed, LatentqError
from broker_config.exit_status import EXIT_BROKEN
from producer.client import DecodeClient
from producer.pipelines import lookup
from producer.prompt_farm import events
from producer.prompt_farm.denoiser import (
    Denoiser,
    check_class,
    class_in,
    folder_of,
    identity_of,
    load_pipeline,
    quiet_libraries,
    vae_config_in,
)
from producer.prompt_farm.generator import DeviceLost, Generator
from producer.prompt_farm.plan import Task
from producer.queued_vae import QueuedVAE

#: Prompts that a pipeline fails with in a row once it has worked: one may be at fault, so many are not.
_PATIENCE: Final = 3


class Lines:
    """What goes out: one line at a time, from any thread."""

    def __init__(self) -> None:
        self._file: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def put(self, line: Mapping[str, Any]) -> None:
        """Writes a line. A reader that is gone ends the process: what it submitted is in the queue."""
        with self._lock:
            try:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
            except BrokenPipeError:
                os._exit(1)


def main() -> int:
    """Runs until there is nothing left to do. Returns the exit status."""
    out = Lines()
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    asked = json.loads(sys.stdin.readline() or "{}")
    if not asked:
        return 0
    began = time.monotonic()
    try:
        client = DecodeClient.from_env()
        denoiser, identity = _load(asked, client)
    except LatentqError as error:
        out.put({"refused": error.to_wire()})
        return 2
    loaded_s = time.monotonic() - began
    out.put({"ready": {"facts": denoiser.facts.to_wire(), "identity": identity, "seconds": loaded_s}})
    options = json.loads(sys.stdin.readline() or "null")
    if options is not None:
        generator = Generator(
            denoiser,
            client,
            device=asked["name"],
            options=options,
            emit=lambda event: out.put(events.to_wire(event)),
            stopping=threading.Event(),
            patience=_PATIENCE,
        )
        try:
            generator.run(_batches(out, stopping))
        except DeviceLost as error:
            out.put({"refused": DenoiseFailed(str(error)).to_wire()})
            client.close()
            os._exit(EXIT_BROKEN)  # what belongs to the device cannot be put away in order
    client.close()
    return 0


def _load(asked: Mapping[str, Any], client: DecodeClient) -> tuple[Denoiser, str]:
    quiet_libraries()
    folder = folder_of(asked["pipeline"], revision=asked["revision"])
    name, vae = class_in(folder), asked["vae"]
    check_class(name, vae=vae)
    pipeline = load_pipeline(
        folder,
        device=asked["device"],
        dtype=asked["dtype"],
        compiled=asked["compile"],
        stand_in=lambda: QueuedVAE(
            vae or lookup(name).vae_of(None), client=client, config=vae_config_in(folder) if vae is None else None
        ),
    )
    denoiser = Denoiser(pipeline, catalog=client.catalog, vae=vae, folder=folder)
    return denoiser, identity_of(folder)


def _batches(out: Lines, stopping: threading.Event) -> Iterator[Sequence[Task]]:
    for line in iter(sys.stdin.readline, ""):
        if stopping.is_set():
            return
        yield [Task.from_wire(item) for item in json.loads(line)]
        out.put({"turn": True})
        if stopping.is_set():
            return


if __name__ == "__main__":
    sys.exit(main())
