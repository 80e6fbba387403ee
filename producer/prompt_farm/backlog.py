"""Batches that are still to be denoised, handed to whichever generator asks next.

A generator that dies gives back what it held. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from producer.prompt_farm.plan import Task

#: How often a generator that has to wait looks whether it still has to.
_TURN_S: Final = 0.5


class Backlog:
    """The batches of a run."""

    def __init__(self, *, has_room: Callable[[float], bool]) -> None:
        """Args:
        has_room: waits up to some seconds until decoding has caught up, and says whether it has.
        """
        self._has_room = has_room
        self._changed = threading.Condition()
        self._batches: deque[list[Task]] = deque()
        self._held: dict[str, dict[str, Task]] = {}
        self._stopped = False
        #: How often each task was held by a generator that died.
        self.deaths: Counter[str] = Counter()

    def fill(self, batches: Iterable[list[Task]]) -> None:
        """Adds batches."""
        with self._changed:
            self._batches.extend(batches)
            self._changed.notify_all()

    def stop(self) -> None:
        """Hands no more batches out."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def batches(self, owner: str) -> Iterator[Sequence[Task]]:
        """Batches for one generator, until there are none; each waits until decoding has caught up."""
        while True:
            while not self._stopped and not self._has_room(_TURN_S):
                pass
            with self._changed:
                if self._stopped or not self._batches:
                    return
                batch = self._batches.popleft()
                self._held.setdefault(owner, {}).update({task.job_id: task for task in batch})
            yield batch

    def land(self, job_id: str) -> Task | None:
        """A task is off a generator's hands. None: it was before."""
        with self._changed:
            for held in self._held.values():
                if job_id in held:
                    return held.pop(job_id)
        return None

    def drop(self, owner: str) -> list[Task]:
        """What a dead generator held."""
        with self._changed:
            return list(self._held.pop(owner, {}).values())

    def holds(self, owner: str) -> bool:
        """Whether a generator has tasks on its hands."""
        with self._changed:
            return bool(self._held.get(owner))

    def abandon(self) -> list[Task]:
        """What nobody will denoise, once every generator has ended."""
        with self._changed:
            left = [task for held in self._held.values() for task in held.values()]
            left += [task for batch in self._batches for task in batch]
            self._held.clear()
            self._batches.clear()
            return left

    def give_back(self, tasks: Iterable[Task]) -> None:
        """Puts tasks first in line again, each alone: one of them may be what killed the generator."""
        with self._changed:
            self._batches.extendleft([task] for task in reversed(list(tasks)))
            self._changed.notify_all()
