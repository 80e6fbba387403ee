"""Everything a worker says to RQ about itself: birth, heartbeat, state, death, commands.

`RqPresence` builds on RQ's `BaseWorker`, so `rq info`, `Worker.all()` and dashboards see a worker like any
other, with several executions at a time. What happens to jobs is in `broker_config/scripts`. RQ calls these
methods undocumented: they stand here only, pinned to `rq>=3.0,<3.1` and checked by tests/contract.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import worker_registration
from rq.serializers import JSONSerializer
from rq.timeouts import TimerDeathPenalty
from rq.utils import now, utcformat
from rq.worker import BaseWorker, WorkerStatus

from broker_config.errors import WorkerNameTaken
from broker_config.scripts import source

logger = logging.getLogger(__name__)


class RqPresence(BaseWorker):
    """This worker, as RQ sees it."""

    death_penalty_class = TimerDeathPenalty  # stages run outside the main thread, where SIGALRM cannot reach

    def __init__(
        self,
        *,
        name: str,
        queues: Sequence[str],
        connection: Redis,
        ttl_s: float,
        on_stop_job: Callable[[str], None],
        on_shutdown: Callable[[], None],
    ) -> None:
        """Args:
        name: unique; RQ refuses one that is alive.
        queues: RQ queue names.
        connection: the command client.
        ttl_s: how long the worker shows as alive after its last heartbeat.
        on_stop_job: called with a job id when someone sends RQ's `stop-job`.
        on_shutdown: called when someone sends RQ's `shutdown`.
        """
        super().__init__(list(queues), name=name, connection=connection, serializer=JSONSerializer)
        self._ttl_s = max(1, round(ttl_s))
        self._on_stop_job = on_stop_job
        self._on_shutdown = on_shutdown
        self._shown: str | None = None
        self._listener: threading.Thread | None = None
        self._leaving = threading.Event()
        self._present = connection.register_script(source("present"))

    def _set_connection(self, connection: Redis) -> Redis:
        # RQ would raise the pool's socket timeout to 415 s, for a BLPOP that we never send.
        return connection

    def announce(self) -> None:
        """Registers the worker and listens for commands.

        Raises:
            WorkerNameTaken: a live worker has this name, or one that died within the last `ttl_s`.
        """
        if self.connection.exists(self.key) and not self.connection.hexists(self.key, "death"):
            raise WorkerNameTaken(
                f"a worker named {self.name} is alive, or died within the last {self._ttl_s} s: choose another "
                "LATENTQ_WORKER_NAME, or start again later"
            )
        self._tell(self._birth)
        self.show(busy=False)
        self._listener = threading.Thread(target=self._listen, name="rq-commands", daemon=True)
        self._listener.start()

    def beat(self) -> None:
        """Shows that the worker lives; brings back its registration if it expired in an outage."""
        created, *_ = self._tell(lambda pipe: self.heartbeat(self._ttl_s, pipeline=pipe))
        if created:  # the hash had expired: HSET made a new one that holds the heartbeat alone
            self._tell(self._birth)
            self._shown = None

    def show(self, *, busy: bool) -> None:
        """Sets RQ's worker state when it changed."""
        state = WorkerStatus.BUSY if busy else WorkerStatus.IDLE
        if state != self._shown:
            self._tell(lambda pipe: self.set_state(state, pipeline=pipe))
            self._shown = state

    def leave(self) -> None:
        """Takes the worker off RQ's lists."""
        self._leaving.set()
        self._tell(self._death)
        if self._listener is not None:
            self._listener.join(timeout=3)

    def _birth(self, pipe: Pipeline) -> None:
        """As `BaseWorker.register_birth`, with our lifetime."""
        self.birth_date = self.last_heartbeat = now()
        pipe.delete(self.key)
        pipe.hset(self.key, mapping=self.serialize())
        worker_registration.register(self, pipe)
        pipe.expire(self.key, self._ttl_s)

    def _death(self, pipe: Pipeline) -> None:
        """As `BaseWorker.register_death`."""
        worker_registration.unregister(self, pipe)
        pipe.hset(self.key, "death", utcformat(now()))
        pipe.expire(self.key, 60)
        pipe.delete(self.executions_key)

    def _tell(self, write: Callable[[Pipeline], object]) -> list[int]:
        """Sends what RQ's code writes into a pipeline as one script, which a full broker takes, too."""
        with self.connection.pipeline(transaction=False) as pipe:
            write(pipe)
            commands = [list(args) for args, _ in pipe.command_stack]
        answers: list[int] = self._present(args=[json.dumps(commands)])
        return answers

    def _listen(self) -> None:
        """Reads RQ's command channel until the worker leaves; reconnects for as long as it takes."""
        pubsub = self.connection.pubsub(ignore_subscribe_messages=True)
        subscribed = False
        while not self._leaving.is_set():
            try:
                if not subscribed:
                    pubsub.subscribe(self.pubsub_channel_name)
                    subscribed = True
                message = pubsub.get_message(timeout=0.5)
            except (RedisError, OSError, TypeError):  # redis-py trips over its own None when cut while it subscribes
                pubsub.close()
                pubsub = self.connection.pubsub(ignore_subscribe_messages=True)
                subscribed = False
                self._leaving.wait(1.0)
                continue
            if message is not None:
                try:
                    self._obey(message)
                except Exception:  # the next command may be `shutdown`
                    logger.error("RQ command failed", exc_info=True, extra={"action": "rq_command_failed"})
        pubsub.close()

    def _obey(self, message: Any) -> None:
        try:
            payload = json.loads(message["data"])
            command = payload["command"]
        except (ValueError, TypeError, KeyError):
            logger.warning("unreadable RQ command", extra={"action": "rq_command_unreadable"})
            return
        logger.info("RQ command %s", command, extra={"action": "rq_command", "command": command})
        if command == "shutdown":
            self._on_shutdown()
        elif command in ("stop-job", "stop-execution") and isinstance(payload.get("job_id"), str):
            self._on_stop_job(payload["job_id"])
