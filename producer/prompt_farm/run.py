"""One run over a list of prompts: what is finished is left alone, what is submitted is adopted, the rest is denoised.

DESIGN. Generators (threads of this process, or processes) take batches from the backlog and tell what happens; the
collector fetches results as their jobs end; the caller's thread iterates and gets each result once. What is told is
acted on in the thread that tells it, so that a caller who is slow to iterate holds nothing up but results that carry
bytes. Order of the results: as they finish.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from broker_config.errors import BrokerError, InvalidOption
from producer.client import DecodeClient
from producer.prompt_farm.adoption import Adopted, adopt
from producer.prompt_farm.backlog import Backlog
from producer.prompt_farm.collector import Collector
from producer.prompt_farm.destination import Destination
from producer.prompt_farm.events import Delayed, Denoised, Ended, Event, Failed, GivenUp, Saved, Submitted
from producer.prompt_farm.manifest import Manifest
from producer.prompt_farm.naming import NameTemplate
from producer.prompt_farm.options import FarmOptions
from producer.prompt_farm.plan import Recipe, Task, batches
from producer.prompt_farm.results import FarmResult, ResultKeeper
from producer.prompt_farm.tally import Tally

#: Results with bytes that wait for the caller.
_UNREAD: Final = 16
#: A task that was held by so many generators that died is what kills them.
_DEATHS: Final = 3
#: A bucket gets a copy of the manifest this often, and at the end.
_COPY_EVERY_S: Final = 30.0
_PAUSE_S: Final = 1.0


class GeneratorPart(Protocol):
    """Something that denoises for a run."""

    @property
    def device(self) -> str:
        """What events call it."""
        ...

    def start(self, run: Run) -> None:
        """Begins to work the run's backlog off; tells `Ended` when it is done."""
        ...

    def stop(self) -> None:
        """Asks it to finish what it denoises and no more."""
        ...

    def join(self) -> None:
        """Returns when it has ended."""
        ...


class Run:
    """A run. Iterate over `results` once."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        client: DecodeClient,
        recipe: Recipe,
        options: FarmOptions,
        generators: Sequence[GeneratorPart],
        destination: Destination | None,
        manifest: Manifest | None,
    ) -> None:
        """Args:
        tasks: what to make.
        client: where latents go and results come from.
        recipe: settings, for the manifest.
        options: how.
        generators: what denoises.
        destination: where files go; None: results carry their bytes.
        manifest: what is finished; None: nothing.

        Raises:
            InvalidOption: the name template does not give each task a name of its own.
        """
        self._tasks = tasks
        self._client = client
        self._options = options
        self._generators = generators
        self._destination = destination
        self._manifest = manifest
        self._events: queue.SimpleQueue[Event | FarmResult] = queue.SimpleQueue()
        self._room = threading.Semaphore(_UNREAD)
        self._running = 0
        #: Why the last device that was given up was.
        self._given_up = ""
        self._copied_s = time.monotonic()
        self.stopping = threading.Event()
        #: Told of every event, in the caller's thread, before it is acted on there.
        self.on_event: Callable[[Event], None] = lambda event: None
        names = NameTemplate(options.name_template).names(tasks) if destination is not None else {}
        finished = self._finished(names)
        self._open = [task for task in tasks if task.job_id not in finished]
        self.tally = Tally(total=len(tasks), finished=len(finished), adopted=0)
        self._keeper = ResultKeeper(
            client,
            recipe=recipe,
            destination=destination,
            manifest=manifest,
            names=names,
            free=not options.keep and options.webhook is None,
            deliver=self._deliver,
        )
        self._collector = Collector(client, take=self._keeper.take, emit=self.emit)
        self.backlog = Backlog(
            has_room=lambda timeout_s: self._collector.wait_below(options.max_ahead, timeout_s=timeout_s)
        )

    def _finished(self, names: dict[str, str]) -> set[str]:
        """Tasks whose file is where the manifest says."""
        if self._manifest is None or self._destination is None:
            return set()
        rows = self._manifest.rows
        taken = {str(row["file"]).rpartition(".")[0].casefold(): job_id for job_id, row in rows.items()}
        for task in self._tasks:
            other = taken.get(names[task.job_id].casefold(), task.job_id)
            if other != task.job_id:
                raise InvalidOption(
                    f"name template {self._options.name_template!r} gives line {task.row.line} the name "
                    f"{names[task.job_id]!r}, which the file of another prompt has: add {{id}}",
                    field="name_template",
                )
        files = {task.job_id: str(rows[task.job_id]["file"]) for task in self._tasks if task.job_id in rows}
        there = self._destination.present(set(files.values()))
        return {job_id for job_id, file in files.items() if file in there}

    # For generators, from their threads -----------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Acts on what happens, and passes it on to whoever iterates."""
        if isinstance(event, Denoised):
            for job_id in event.tasks:
                self._keeper.note_denoised(job_id, event.seconds / len(event.tasks))
        elif isinstance(event, Submitted):
            task = self.backlog.land(event.task)
            if task is not None:
                self._collector.add(task, spooled=event.spooled)
        elif isinstance(event, Failed):
            self.backlog.land(event.task)
        self._events.put(event)

    def recover(self, owner: str, *, is_blamed: bool) -> bool:
        """A generator died: what it had submitted is adopted, the rest is denoised again, but not for ever.

        Args:
            owner: the generator.
            is_blamed: whether it may have died of the prompt it had on the device.

        Returns:
            Whether that prompt is given up.
        """
        held = self.backlog.drop(owner)
        while not self.stopping.is_set():
            try:
                adopted = self._adopt(held)
                break
            except BrokerError as error:
                self.emit(Delayed(stage="submit", code=error.code, message=error.message))
                self.stopping.wait(_PAUSE_S)
        else:
            return False
        for task in adopted.waiting:
            self._collector.add(task, spooled=task.submit_id in adopted.spooled)
        again = []
        # What stands first was on the device; the others only waited for it.
        for number, task in enumerate(adopted.missing):
            self.backlog.deaths[task.job_id] += is_blamed and number == 0
            if self.backlog.deaths[task.job_id] < _DEATHS:
                again.append(task)
            else:
                message = f"{_DEATHS} generators died while this prompt was denoised"
                self.emit(Failed(task=task.job_id, stage="denoise", code="denoise_failed", message=message))
        self.backlog.give_back(again)
        return len(again) < len(adopted.missing)

    def _deliver(self, result: FarmResult) -> None:
        if result.data is not None:
            while not self._room.acquire(timeout=_PAUSE_S):
                if self.stopping.is_set():
                    return
        self._events.put(result)

    def _adopt(self, tasks: Sequence[Task]) -> Adopted:
        spool = self._client.spool
        return adopt(self._client, tasks, spooled=spool.spool.holds if spool is not None else lambda ids: set())

    # For the caller -------------------------------------------------------------------------------------

    def results(self) -> Iterator[FarmResult]:
        """Every result of this run, once, as they finish; failed ones, too.

        Raises:
            BrokerError: the broker does not answer at the start.
        """
        try:
            self._begin()
            while self.tally.left > 0:
                item = self._events.get()
                result = item if isinstance(item, FarmResult) else self._handle(item)
                if result is not None:
                    self._count(result)
                    yield result
                    if result.data is not None:  # whoever asks for the next one has this one
                        self._keeper.free(result.task)
                if self._running == 0 and self.stopping.is_set() and self._events.empty():
                    return
        finally:
            self.close()

    @property
    def depth(self) -> int:
        """Results under way."""
        return self._collector.depth

    def stop(self) -> None:
        """Denoises no further prompt; what is being denoised is still submitted. Results are left for the next run."""
        self.stopping.set()
        self.backlog.stop()
        for generator in self._generators:
            generator.stop()
        if self._running == 0:
            self._events.put(Ended(device=""))  # wakes whoever iterates

    def close(self) -> None:
        """Ends everything; results that are being stored are stored first."""
        self.stopping.set()
        self.backlog.stop()
        for generator in self._generators:
            generator.stop()
        for generator in self._generators:
            generator.join()
        self._collector.close()
        self._copy_manifest()

    def _begin(self) -> None:
        adopted = self._adopt(self._open)
        self.tally.adopted = len(adopted.waiting)
        self._collector.start()
        for task in adopted.waiting:
            self._collector.add(task, spooled=task.submit_id in adopted.spooled)
        self.backlog.fill(batches(adopted.missing, size=self._options.batch_size))
        self._running = len(self._generators)
        for generator in self._generators:
            generator.start(self)

    def _handle(self, event: Event) -> FarmResult | None:
        self.on_event(event)
        if isinstance(event, Denoised):
            self.tally.denoise(event)
        elif isinstance(event, Failed):
            task = next(item for item in self._tasks if item.job_id == event.task)
            return FarmResult(task=task, timings_s={}, error=event)
        elif isinstance(event, GivenUp):
            self._given_up = f"; {event.device} was given up: {event.message}"
        elif isinstance(event, Ended) and event.device:
            self._running -= 1
            if self._running == 0:
                self._nobody_left()
        return None

    def _nobody_left(self) -> None:
        """Every generator has ended: what is not denoised now will not be."""
        self._collector.expect_no_more()
        if self.stopping.is_set():
            return
        for task in self.backlog.abandon():
            message = f"every generator has ended before this prompt was denoised{self._given_up}"
            self.emit(Failed(task=task.job_id, stage="denoise", code="denoise_failed", message=message))

    def _count(self, result: FarmResult) -> None:
        if result.error is not None:
            self.tally.fail()
            return
        self.tally.save(result)
        self.on_event(Saved(task=result.task.job_id))
        if result.data is not None:
            self._room.release()
        if time.monotonic() - self._copied_s > _COPY_EVERY_S:
            self._copy_manifest()

    def _copy_manifest(self) -> None:
        self._copied_s = time.monotonic()
        if self._manifest is not None and self._destination is not None:
            try:
                self._destination.keep_copy(self._manifest.data())
            except BrokerError as error:
                self.on_event(Delayed(stage="store", code=error.code, message=error.message))


def settled(options: FarmOptions, *, pipeline: str, vae: str, output: str) -> Recipe:
    """The recipe of a run with these options."""
    return Recipe(
        pipeline=pipeline,
        vae=vae,
        output=output,
        mode=options.mode,
        images_per_prompt=options.images_per_prompt,
        seed=options.seed,
        defaults=dict(options.defaults),
    )
