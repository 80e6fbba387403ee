"""Which of some jobs have ended: blocks on the broker's own streams, so a job that ends wakes whoever waits for it.

A job that waits in the spool is unknown to the broker until it is flushed; it is waited for all the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

from broker_config import keys
from broker_config.connection import MAX_BLOCK_S, broker_errors
from broker_config.job_store import JobStore
from producer.spool import Spool

#: Streams one blocking read watches; Redis looks at each of them when any wakes us.
_WATCH_CHUNK: Final = 512
#: How often the spool is looked at while jobs wait there.
SPOOL_LOOK_S: Final = 0.2


def ended_jobs(job_ids: Iterable[str], *, store: JobStore, spool: Spool | None, timeout: float | None) -> Iterator[str]:
    """Ids of jobs as they end, however they end; stops early when `timeout` seconds have passed.

    Raises:
        JobNotFound: one of them does not exist.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    unseen = list(dict.fromkeys(job_ids))
    watched: dict[str, None] = {}
    while unseen or watched:
        spooled = spool.holds(unseen) if spool is not None else set()
        ready = [job_id for job_id in unseen if job_id not in spooled]
        unseen = [job_id for job_id in unseen if job_id in spooled]
        watched |= dict.fromkeys(ready)
        # What ended before we looked, and ids that do not exist, come first.
        for job_id in ended_now(store, ready):
            del watched[job_id]
            yield job_id
        longest_s = SPOOL_LOOK_S if unseen else MAX_BLOCK_S
        left_s = longest_s if deadline is None else min(longest_s, deadline - time.monotonic())
        if not unseen and not watched:
            return
        if left_s <= 0:
            return
        if not watched:
            time.sleep(left_s)
            continue
        for job_id in _next_ended(store, list(watched), block_s=left_s):
            del watched[job_id]
            yield job_id


def ended_now(store: JobStore, job_ids: list[str]) -> Iterator[str]:
    """Those of `job_ids` that have ended.

    Raises:
        JobNotFound: one of them does not exist.
    """
    for start in range(0, len(job_ids), _WATCH_CHUNK):
        yield from store.ended(job_ids[start : start + _WATCH_CHUNK])


def _next_ended(store: JobStore, job_ids: list[str], *, block_s: float) -> list[str]:
    """Those of `job_ids` that ended; waits up to `block_s` for the first."""
    ended = heard_of(store, job_ids, block_s=block_s)
    if not ended:  # a result may have been retired between two looks, and its stream with it
        ended = store.ended(job_ids[:_WATCH_CHUNK])
    return ended


def heard_of(store: JobStore, job_ids: list[str], *, block_s: float) -> list[str]:
    """Those of `job_ids`, known to the broker or not, that are heard to have ended; waits for the first.

    Cheap enough to be called all the time. A job that ended and was freed since is not heard of: look now and then.
    """
    if len(job_ids) > _WATCH_CHUNK:
        block_s = min(block_s, 0.05)  # the others wait for their turn
    ended: list[str] = []
    for start in range(0, len(job_ids), _WATCH_CHUNK):
        streams = {keys.rq_results(job_id): "0-0" for job_id in job_ids[start : start + _WATCH_CHUNK]}
        prefix = len(keys.rq_results(""))
        with broker_errors(store.connections.url):
            answer = store.connections.blocking.xread(
                streams,  # type: ignore[arg-type]
                block=max(1, round(block_s * 1000)),
            )
        ended += [_stream_name(name)[prefix:] for name in _stream_names(answer)]
    return ended


def _stream_names(answer: Any) -> list[Any]:
    """RESP3 answers with a map, RESP2 with pairs."""
    return list(answer) if isinstance(answer, dict) else [pair[0] for pair in answer or []]


def _stream_name(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
