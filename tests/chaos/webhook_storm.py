"""`python -m tests.chaos.webhook_storm`: jobs end in every way while workers and couriers die at random and the
receiver misbehaves; then its book is compared with the jobs. Exits 1 if anything is missing, doubled or unsigned.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import redis
from aiohttp import web
from standardwebhooks import WebhookVerificationError

from broker_config import keys
from broker_config.connection import connect_url
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import BrokerError
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from broker_config.webhook_deliveries import WebhookDeliveries
from producer import DecodeClient
from producer.submission import new_job_id
from tests.chaos.crew import Member
from tests.support.keys_left import stray_keys
from tests.support.processes import environment_of
from tests.support.receivers import OTHER_SECRET, SECRET, Receiver, with_webhooks
from tests.support.tiny_vaes import write_tiny_catalog
from tests.support.wait import wait_until


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How hard it blows."""

    seed: int
    jobs: int
    #: SIGKILLs of workers and couriers, at least.
    kills: int
    #: Longest time the whole may take.
    bound_s: float = 1200.0


@dataclass
class Report:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    #: Requests that came in, and of these the second and later ones of one event.
    requests: int = 0
    repeated: int = 0
    refused_by_receiver: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class WebhookStorm:
    """Runs one plan."""

    def __init__(self, plan: Plan, *, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._random = random.Random(plan.seed)
        self._report = Report()
        self._refused: set[str] = set()
        self._accepted: list[str] = []

    def run(self) -> Report:
        """The storm, from the first job to the compared books."""
        started = time.monotonic()
        with (
            tempfile.TemporaryDirectory(prefix="latentq-webhooks-") as name,
            EmbeddedBroker(Path(name) / "broker", max_memory_bytes=1 << 30) as broker,
            Receiver(self._answer) as receiver,
        ):
            folder = Path(name)
            catalog = write_tiny_catalog(folder / "vaes")
            self._settings = with_webhooks(
                load_settings(redis_url=broker.url, catalog=catalog, lease_s=3.0, lease_renew_s=0.75, _env_file=None)
            )
            self._broker, self._receiver = broker, receiver
            connections = connect_url(broker.url, name="latentq-chaos")
            self._client = DecodeClient(connections, settings=self._settings, catalog=VaeCatalog.load(catalog))
            self._deliveries = WebhookDeliveries(connections, self._settings)
            crew = self._make_crew(folder)
            for member in crew:
                member.start()
            try:
                wait_until(lambda: self._client.store.served({"sd"}), timeout_s=self._plan.bound_s, what="a worker")
                self._blow(crew)
                self._settle(crew)
            finally:
                for member in crew:
                    member.end()
            self._compare()
            self._report.problems += _tracebacks(folder)
            connections.close()
        self._report.seconds = time.monotonic() - started
        return self._report

    def _make_crew(self, folder: Path) -> list[Member]:
        environment = environment_of(self._settings) | {
            "LATENTQ_LOG_LEVEL": "WARNING",
            "LATENTQ_LOG_FORMAT": "json",
            "LATENTQ_COURIER_TIMEOUT_S": "2",
            "LATENTQ_COURIER_LEASE_S": "5",
        }
        places = [("worker", 0), ("worker", 1), ("janitor", 0), ("courier", 0), ("courier", 1)]
        return [
            Member(kind=kind, number=number, environment=environment, log=folder / f"{kind}-{number}.log")
            for kind, number in places
        ]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        """Refuses one event in ten at first; breaks off one answer in ten, after which it does not know whether it was
        believed. Once for each event: the attempt after the next would be five minutes away.
        """
        name = request.headers["webhook-id"]
        if name in self._refused or self._random.random() < 0.8:
            return web.Response(status=204)
        self._refused.add(name)
        if self._random.random() < 0.5:
            return web.Response(status=self._random.choice([500, 503, 429]))
        assert request.transport is not None
        request.transport.close()
        return web.Response(status=204)

    # The storm ------------------------------------------------------------------------------------------

    def _blow(self, crew: list[Member]) -> None:
        """Submits job after job, and kills someone every now and then."""
        plan = self._plan
        dying = [member for member in crew if member.kind != "janitor"]
        every = max(1, plan.jobs // plan.kills)
        for number in range(plan.jobs):
            self._submit()
            if number % every == every - 1:
                self._kill_one_of(dying)
            time.sleep(self._random.uniform(0, 0.02))
        while self._report.kills.total() < plan.kills:
            self._kill_one_of(dying)
            time.sleep(self._random.uniform(0.1, 0.5))

    def _kill_one_of(self, crew: list[Member]) -> None:
        member = self._random.choice(crew)
        member.kill()
        self._report.kills[member.kind] += 1
        member.start()

    def _submit(self) -> None:
        """A job that will succeed, one that will be canceled, or one that nobody starts in time."""
        fate = self._random.random()
        job_id = new_job_id()
        options: dict[str, object] = {"start_within_s": 0.001} if fate < 0.1 else {}
        job = self._client.submit(
            np.random.default_rng(len(self._accepted)).standard_normal((1, 4, 8, 8)).astype(np.float32),
            vae="sd",
            provenance=False,
            job_id=job_id,
            webhook=self._receiver.url,
            webhook_secret=self._random.choice([SECRET, f"{OTHER_SECRET},{SECRET}"]),
            **options,  # type: ignore[arg-type]
        )
        self._accepted.append(job_id)
        if fate > 0.9:
            job.cancel()

    def _settle(self, crew: list[Member]) -> None:
        self._say(f"settling: {len(self._accepted)} jobs, {dict(self._report.kills)}")

        def settled() -> bool:
            for member in crew:
                if not member.is_alive:
                    self._report.problems.append(f"{member.names[-1]} ended by itself")
                    member.start()
            try:
                counts = self._deliveries.counts()
            except BrokerError:
                return False
            return counts.pending == 0 and counts.reserved == 0

        wait_until(settled, timeout_s=self._plan.bound_s, what="the outbox to be empty")

    # After ----------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """The receiver's book against the jobs."""
        report = self._report
        seen: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for request in self._receiver.received:
            try:
                message = request.verified(SECRET)
            except WebhookVerificationError as error:
                report.problems.append(f"{request.headers.get('webhook-id')}: {error}")
                continue
            data = message["data"]
            if message["type"] != f"job.{data['status']}":
                report.problems.append(f"{request.id}: type {message['type']}, status {data['status']}")
            if data["status"] == "succeeded" and len(data["outputs"]) != 1:
                report.problems.append(f"{request.id}: {len(data['outputs'])} outputs")
            seen[data["id"]].add((request.id, data["status"]))
        for job_id in self._accepted:
            status = str(self._client.store.snapshot(job_id).status)
            report.outcomes[status] += 1
            if seen[job_id] != {(f"msg_{job_id}_{status}", status)}:
                report.problems.append(f"{job_id} is {status}, the receiver saw {seen[job_id] or 'nothing'}")
        report.requests = len(self._receiver.received)
        report.repeated = report.requests - len({request.id for request in self._receiver.received})
        report.refused_by_receiver = len(self._refused)
        if set(seen) - set(self._accepted):
            report.problems.append("messages about jobs that there are not")
        if self._deliveries.counts().dead_letters:
            report.problems.append(f"dead letters: {self._deliveries.page('dead').deliveries[:3]}")
        with redis.Redis.from_url(self._broker.url) as admin:
            report.problems += [f"stray key {key}" for key in stray_keys(admin)]
            totals = {name: int(value) for name, value in admin.hgetall(keys.TOTALS).items()}
            if any(totals.values()):
                report.problems.append(f"totals are not zero: {totals}")


def _tracebacks(folder: Path) -> list[str]:
    """Log lines that should not be there, whatever was killed."""
    found = []
    for path in folder.glob("*.log"):
        lines = path.read_text(errors="replace").splitlines()
        found += [f"{path.name}: {line[:1000]}" for line in lines if "Traceback" in line or "delivery_broke" in line]
    return found[:10]


def show(report: Report, plan: Plan) -> None:
    """Prints what happened."""
    print(f"seed {plan.seed}: {plan.jobs} jobs in {report.seconds:.0f} s: {dict(report.outcomes)}")
    print(f"SIGKILLs: {dict(report.kills)}; the receiver failed {report.refused_by_receiver} first attempts")
    print(f"requests: {report.requests}, of which {report.repeated} repeat an event under its id")
    for problem in report.problems:
        print(f"PROBLEM {problem}")


def main() -> int:
    """Runs the storm that the arguments describe."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.webhook_storm")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    plan = Plan(seed=arguments.seed, jobs=arguments.jobs, kills=arguments.kills)
    report = WebhookStorm(plan, say=print).run()
    show(report, plan)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
