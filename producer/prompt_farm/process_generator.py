"""A generator process as its parent sees it: started, fed, listened to, and started again when it dies.

DESIGN. One thread starts the process and reads what it tells until it ends; so the child's parent, as the kernel
counts, is a thread that lives as long as the child, and a child whose parent was killed is killed with it: it would
hold the device's memory while the next run loads its models. A second thread writes batches, two ahead, so that the
device never waits for a line.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from broker_config.errors import ConfigurationError
from producer.prompt_farm.events import Ended, GivenUp, Restarted, error_from_wire, from_wire
from producer.prompt_farm.facts import PipelineFacts
from producer.supervisor import dying_with_parent, sharing_cores

if TYPE_CHECKING:
    from producer.prompt_farm.run import Run

#: What the interpreter runs as the process.
_PROGRAM: Final = ("-m", "producer.prompt_farm.generator_process")
#: Batches that a process has, the one it denoises included.
_AHEAD: Final = 2
#: A device whose processes died so often without getting anything done will not get anything done,
_IDLE_DEATHS: Final = 3
#: unless it was a prompt that they died of: then the next prompts have as many tries. A device that three prompts in a
#: row died on kills every prompt.
_IDLE_DEATHS_AT_MOST: Final = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """What a process says once its pipeline is loaded."""

    facts: PipelineFacts
    #: Says which weights it has.
    identity: str
    #: How long loading took.
    seconds: float


@dataclass(kw_only=True, slots=True)
class _Life:
    """What became of one process."""

    #: Its pipeline is loaded. It gets no prompt before: others may be free for them meanwhile.
    loaded: threading.Event = field(default_factory=threading.Event)
    #: Whether it was done with a batch.
    landed: bool = False
    #: Whether it has got all that was left.
    is_fed: bool = False
    #: Why it ended, in its own words.
    why: str = ""


class ProcessGenerator:
    """One device."""

    def __init__(
        self,
        *,
        name: str,
        device: str,
        pipeline: str,
        revision: str | None,
        vae: str | None,
        dtype: str | None,
        compiled: bool,
        environment: Mapping[str, str],
    ) -> None:
        """Args:
        name: what events call it; unlike the others'.
        device: `cuda:0`, `cpu`, … or `auto`.
        pipeline: repo or folder.
        revision: of a repo.
        vae: catalogue entry to decode with; None: the pipeline's.
        dtype: of the weights; None: by the device.
        compiled: whether to compile what denoises.
        environment: of the process.
        """
        self.device = name
        self._asked = {
            "name": name,
            "pipeline": pipeline,
            "revision": revision,
            "vae": vae,
            "device": device,
            "dtype": dtype,
            "compile": compiled,
        }
        self._environment = sharing_cores(environment)
        #: What the first process said, or why it refused.
        self.ready: Future[Ready] = Future()
        self._begun = threading.Event()
        self._run: Run | None = None
        self._options: Mapping[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        #: Held while it is settled who tells `Ended`: the thread that leaves, or `start`, which came too late.
        self._leaving = threading.Lock()
        self._has_left = False
        self._thread = threading.Thread(target=self._keep, name=f"farm-{name}", daemon=True)

    def load(self) -> None:
        """Starts the process, which loads the pipeline."""
        self._thread.start()

    def set_options(self, options: Mapping[str, Any]) -> None:
        """Options of the submits; to be said before `start`."""
        self._options = options

    def start(self, run: Run) -> None:
        """Begins to work the run's backlog off."""
        with self._leaving:
            self._run = run
            has_left = self._has_left
        self._begun.set()
        if has_left:
            run.emit(Ended(device=self.device))

    def stop(self) -> None:
        """Asks the process to finish what it denoises and no more."""
        self._stopping = True
        self._begun.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM if self._run is not None else signal.SIGKILL)

    def kill(self) -> None:
        """Ends the process at once."""
        self._stopping = True
        self._begun.set()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def join(self) -> None:
        """Returns when the process has ended."""
        if self._thread.is_alive():
            self._thread.join()

    # The thread that starts and reads -------------------------------------------------------------------

    def _keep(self) -> None:
        try:
            self._live_on()
        finally:
            with self._leaving:
                self._has_left = True
                run = self._run
            if run is not None:
                run.emit(Ended(device=self.device))

    def _live_on(self) -> None:
        """Process after process, until nothing is left to do, or this device gets nothing done."""
        deaths, allowed = 0, _IDLE_DEATHS
        while not self._stopping:
            life, status = self._live()
            message = self._describe(life, status)
            if not self.ready.done():  # it died while it loaded for the first time, and has said why on standard error
                self.ready.set_exception(ConfigurationError(message, field="pipeline"))
            if self.ready.exception() is not None:
                return
            self._begun.wait()  # one that died before is started again once there is something to do
            run = self._run
            if run is None or self._stopping or (life.is_fed and not run.backlog.holds(self.device)):
                return
            # One that was told to end alone has finished what it denoised: no prompt is to blame.
            gave_up = run.recover(self.device, is_blamed=status != 0)
            if run.stopping.is_set():
                return
            deaths, allowed = (0, _IDLE_DEATHS) if life.landed else (deaths + 1, allowed)
            if gave_up:
                allowed = min(deaths + _IDLE_DEATHS, _IDLE_DEATHS_AT_MOST)
            if deaths >= allowed:
                run.emit(GivenUp(device=self.device, message=f"{deaths} deaths in a row, the last one: {message}"))
                return
            run.emit(Restarted(device=self.device, message=message))

    def _describe(self, life: _Life, status: int) -> str:
        how = f"signal {-status}" if status < 0 else f"status {status}" if status else "work left"
        return f"the generator on {self.device} ended with {how}" + (f": {life.why}" if life.why else "")

    def _live(self) -> tuple[_Life, int]:
        """One process, from start to end. Returns what became of it, and its exit status."""
        life = _Life()
        self._process = process = subprocess.Popen(
            [sys.executable, *_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            preexec_fn=dying_with_parent(signal.SIGKILL),
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        turns = threading.Semaphore(_AHEAD)
        feeder = threading.Thread(
            target=self._feed, args=(process, life, turns), name=f"feed-{self.device}", daemon=True
        )
        feeder.start()
        for line in process.stdout:
            try:
                told = json.loads(line)
            except ValueError:  # the last words of a process that was killed
                break
            if "turn" in told:
                turns.release()
                life.landed = True
            elif "event" in told:
                assert self._run is not None
                self._run.emit(from_wire(told))
            else:
                self._answer(told, life)
        status = process.wait()
        process.stdout.close()
        turns.release(_AHEAD)  # a feeder that waits for its turn finds a closed pipe
        feeder.join()
        return life, status

    def _answer(self, told: Mapping[str, Any], life: _Life) -> None:
        if "refused" in told:
            life.why = " ".join(told["refused"]["message"].split())
            if not self.ready.done():
                self.ready.set_exception(error_from_wire(told["refused"]))
            return
        life.loaded.set()
        if self.ready.done():
            return
        said = told["ready"]
        facts = PipelineFacts.from_wire(said["facts"])
        self.ready.set_result(Ready(facts=facts, identity=said["identity"], seconds=said["seconds"]))

    # The thread that writes -----------------------------------------------------------------------------

    def _feed(self, process: subprocess.Popen[bytes], life: _Life, turns: threading.Semaphore) -> None:
        assert process.stdin is not None
        try:
            self._write(process, self._asked)
            for needed in (life.loaded, self._begun):
                while not needed.wait(1.0):
                    if process.poll() is not None or self._stopping:
                        return
            if self._run is None or self._stopping:
                return
            self._write(process, self._options)
            batches = self._run.backlog.batches(self.device)
            while True:
                turns.acquire()
                if process.poll() is not None:
                    return
                batch = next(batches, None)
                if batch is None:
                    life.is_fed = True
                    return
                self._write(process, [task.to_wire() for task in batch])
        except (BrokenPipeError, ValueError):  # it died: the other thread sees to it
            return
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def _write(self, process: subprocess.Popen[bytes], line: object) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.flush()
