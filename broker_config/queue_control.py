"""What an operator does to queues: hold one back, let it go on, empty it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from redis.commands.core import Script

from broker_config import keys
from broker_config.answers import pipelined, text
from broker_config.connection import Connections, broker_errors
from broker_config.scripts import source

#: Jobs canceled in one round trip; each is a script of some thirty commands, a few hundred microseconds.
_CHUNK: Final = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Purged:
    """What emptying queues came to."""

    #: Jobs that waited and are canceled now.
    canceled: int
    #: Jobs that a worker took first; they go on.
    taken: int
    #: Jobs that are not latentq's, left where they are: the next worker fails them.
    foreign: int


class QueueControl:
    """Changes the queues of one broker."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def pause(self, vae: str) -> bool:
        """Workers take no more jobs of `vae`; those they hold go on. Returns whether that is new."""
        with broker_errors(self._connections.url):
            return bool(self._connections.commands.sadd(keys.PAUSED, vae))

    def resume(self, vae: str) -> bool:
        """Workers take jobs of `vae` again, within a second. Returns whether it was paused."""
        with broker_errors(self._connections.url):
            return bool(self._connections.commands.srem(keys.PAUSED, vae))

    def waiting(self, queues: Iterable[str]) -> dict[str, list[str]]:
        """Ids that wait in these queues now, parked ones included, by queue."""
        names = list(queues)
        with pipelined(self._connections) as pipe:
            for queue in names:
                pipe.lrange(keys.rq_queue(queue), 0, -1)
            pipe.zrange(keys.PARKED, 0, -1)
            *lists, parked = pipe.execute()
        found = {queue: [text(job_id) for job_id in ids] for queue, ids in zip(names, lists, strict=True)}
        if parked:
            with pipelined(self._connections) as pipe:
                for job_id in parked:
                    pipe.hget(keys.job(text(job_id)), "rq_queue")
                for job_id, queue in zip(parked, pipe.execute(), strict=True):
                    if queue is not None and text(queue) in found:
                        found[text(queue)].append(text(job_id))
        return found

    def purge(self, waiting: dict[str, list[str]]) -> Purged:
        """Cancels the jobs of `waiting` (see there) that still wait; one that a worker took meanwhile goes on.

        Each job ends through the script that `cancel` uses, so its record, its latents' retention and whoever waits
        for it see an ordinary cancel.
        """
        words: list[str] = []
        script = self._connections.commands.register_script(source("cancel"))
        for queue, ids in waiting.items():
            times = Counter(ids)  # RQ's tools can put an id in twice; the script takes one off
            once = list(times)
            for start in range(0, len(once), _CHUNK):
                words += self._cancel(script, queue, once[start : start + _CHUNK], times)
        return Purged(canceled=words.count("canceled"), taken=words.count("processing"), foreign=words.count("foreign"))

    def _cancel(self, script: Script, queue: str, ids: Sequence[str], times: Mapping[str, int]) -> list[str]:
        with pipelined(self._connections) as pipe:
            for job_id in ids:
                pipe.hget(keys.job(job_id), "state")
                pipe.exists(keys.rq_job(job_id))
            facts = pipe.execute()
            known = list(zip(ids, facts[::2], facts[1::2], strict=True))
            for job_id, state, _ in known:
                if state in (b"queued", b"processing"):
                    script(args=[job_id, "", "queued"], client=pipe)
            words = [text(word) for word in pipe.execute()]
            for job_id, state, in_rq in known:
                if state is None and in_rq:
                    words.append("foreign")
                elif times[job_id] > 1 or state not in (b"queued", b"processing"):  # an entry is left, for nothing
                    pipe.lrem(keys.rq_queue(queue), 0, job_id)
            pipe.execute()
        return words
