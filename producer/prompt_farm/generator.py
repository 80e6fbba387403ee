"""A generator: denoises batch after batch on one device, and hands the latents over meanwhile.

DESIGN. The caller's thread denoises; a second one submits, so that a slow line never keeps the device waiting. Between
them is a short queue: when the broker takes nothing for long, the device waits, too, and memory does not fill up. What
goes wrong with one task is told of and the next one follows; what goes wrong with the device ends the generator, and
the task it was at is not told of as failed: it may be as good as any other.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from broker_config.errors import BrokerError, DenoiseFailed, JobConflict, LatentqError, QueueFull
from producer.client import DecodeClient
from producer.prompt_farm.denoiser import Denoiser
from producer.prompt_farm.events import Delayed, Denoised, Event, Submitted, failure
from producer.prompt_farm.facts import metadata_of, size_options
from producer.prompt_farm.plan import Task

if TYPE_CHECKING:
    import torch

#: Tasks whose latents are held in memory while the broker takes none.
_HELD: Final = 4
#: Pause after the broker did not take latents, and how long it is asked for at a time.
_PAUSE_S: Final = 1.0


class DeviceLost(Exception):
    """What this process asks of its device will go on failing; a new process may have a sound one."""


class Generator:
    """One device's part of a run."""

    def __init__(
        self,
        denoiser: Denoiser,
        client: DecodeClient,
        *,
        device: str,
        options: Mapping[str, Any],
        emit: Callable[[Event], None],
        stopping: threading.Event,
        patience: int | None = None,
    ) -> None:
        """Args:
        denoiser: the pipeline.
        client: takes the latents.
        device: what events call it.
        options: of each submit, beside what the pipeline and the task tell.
        emit: told what happens, from two threads.
        stopping: once set, a submit that the broker refuses is not tried again.
        patience: a pipeline that has worked and then fails with so many prompts in a row is lost; None: only what
            the device says counts.
        """
        self._denoiser = denoiser
        self._client = client
        self._device = device
        self._options = options
        self._emit = emit
        self._stopping = stopping
        self._patience = patience
        self._has_worked = False
        #: Prompts that the pipeline has failed with since it last worked.
        self._failing: set[str] = set()
        #: What the thread that submits has found out about the device.
        self._lost: DeviceLost | None = None
        self._ready: queue.Queue[tuple[Task, torch.Tensor] | None] = queue.Queue(_HELD)

    def run(self, batches: Iterable[Sequence[Task]]) -> None:
        """Works off the batches; returns when the last latents are handed over.

        Raises:
            DeviceLost: there is no use in going on; latents that could be handed over are.
        """
        submitter = threading.Thread(target=self._submit_all, name=f"submit-{self._device}")
        submitter.start()
        try:
            for batch in batches:
                self._denoise(batch)
                if self._lost is not None:
                    break
        finally:
            self._ready.put(None)
            submitter.join()
        if self._lost is not None:
            raise self._lost

    def _denoise(self, batch: Sequence[Task]) -> None:
        began = time.monotonic()
        try:
            latents = self._denoiser.latents_of(batch)
            self._denoiser.wait()
        except Exception as error:
            self._check_device(error)
            if len(batch) > 1:  # one of them must not take the others along
                for task in batch:
                    self._denoise([task])
                return
            if not isinstance(error, LatentqError):
                error = DenoiseFailed(f"{self._denoiser.facts.name} raised {type(error).__name__}: {error}")
                self._lose_patience(batch[0], error)
            self._emit(failure(batch[0].job_id, "denoise", error))
            return
        seconds = time.monotonic() - began
        self._has_worked = True
        self._failing.clear()
        ids = tuple(task.job_id for task in batch)
        self._emit(Denoised(device=self._device, tasks=ids, began_s=began, seconds=seconds))
        for task, item in zip(batch, latents, strict=True):
            self._ready.put((task, item))

    def _check_device(self, error: Exception) -> None:
        """After some faults every call on a device raises. Then this raises as well."""
        try:
            self._denoiser.wait()
        except Exception as lost:
            raise DeviceLost(f"the device is lost since {type(error).__name__}: {error}") from lost

    def _lose_patience(self, task: Task, error: DenoiseFailed) -> None:
        """One that has never worked is not lost: a new one would take minutes to load, and not work either."""
        self._failing.add(task.row.prompt)
        if self._has_worked and len(self._failing) == self._patience:
            raise DeviceLost(f"{self._patience} prompts in a row failed: {error.message}")

    def _submit_all(self) -> None:
        while True:
            item = self._ready.get()
            if item is None:
                return
            task, latents = item
            try:
                self._submit(task, latents)
            except LatentqError as error:
                self._emit(failure(task.job_id, "submit", error))
            except Exception as error:  # latents come off the device here
                try:
                    self._check_device(error)
                except DeviceLost as lost:
                    self._lost = lost
                else:
                    self._emit(failure(task.job_id, "submit", error))
            else:
                self._emit(Submitted(task=task.job_id, spooled=self._is_spooled(task)))

    def _submit(self, task: Task, latents: torch.Tensor) -> None:
        facts = self._denoiser.facts
        while True:
            try:
                self._client.submit(
                    latents,
                    **self._denoiser.options,
                    **self._options,
                    **{name: size for name, size in size_options(task, facts).items() if name in facts.tells},
                    metadata=metadata_of(task, facts),
                    job_id=task.submit_id,
                )
                return
            except JobConflict:
                return  # someone else made the same task: theirs is as good
            except BrokerError as error:
                if self._stopping.is_set():
                    raise
                self._emit(Delayed(stage="submit", code=error.code, message=error.message))
                pause_s = error.retry_after_s if isinstance(error, QueueFull) else _PAUSE_S
                self._stopping.wait(min(pause_s, _PAUSE_S))

    def _is_spooled(self, task: Task) -> bool:
        spool = self._client.spool
        return spool is not None and bool(spool.spool.holds([task.submit_id]))
