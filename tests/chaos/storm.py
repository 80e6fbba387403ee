"""One storm: jobs go in while workers, janitors, broker and connections die at random; then the books are checked."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import redis

from broker_config import keys
from broker_config.connection import connect_url
from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import BrokerError, LatentqError
from broker_config.job_record import JobSnapshot
from broker_config.settings import Settings, load_settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient
from producer.decode_options import DecodeOptions
from producer.submission import build_request, new_job_id
from producer.tensor_input import to_tensor_file
from tests.chaos.books import VARIANTS, Books, digest, suspicious_lines
from tests.chaos.crew import POISON, Member
from tests.chaos.storm_plan import Plan, Report
from tests.support.faulty_proxy import FaultyProxy
from tests.support.processes import ROOT, environment_of
from tests.support.tiny_vaes import write_tiny_catalog
from tests.support.wait import wait_until

#: Fresh jobs that idle workers are timed with.
_PICKUPS = 20


class Storm:
    """Runs one plan."""

    def __init__(self, plan: Plan, *, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._random = random.Random(plan.seed)
        self._report = Report()
        self._stop = threading.Event()
        self._accepted: dict[str, int] = {}
        self._damaged: set[str] = set()
        self._deadly: set[str] = set()
        self._disturbed_at = 0.0
        self._watchers: list[threading.Thread] = []

    def run(self) -> Report:
        """The storm, from the first job to the checked books."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="latentq-chaos-") as name:
            folder = Path(name)
            with (
                EmbeddedBroker(folder / "broker", max_memory_bytes=1 << 30) as broker,
                FaultyProxy(broker.url) as proxy,
            ):
                self._broker, self._proxy = broker, proxy
                self._settings = self._settings_for(proxy.url, write_tiny_catalog(folder / "vaes"))
                self._direct = self._settings.model_copy(
                    update={"redis_url": load_settings(redis_url=broker.url).redis_url}
                )
                self._crew = self._make_crew(folder)
                for member in self._crew:
                    member.start()
                try:
                    self._wait_for_worker()
                    self._expected = self._undisturbed()
                    self._blow()
                    self._settle()
                    self._calm()
                finally:
                    self._stop.set()
                    for member in self._crew:
                        member.end()
                    for thread in self._watchers:
                        thread.join()
                books = Books(
                    accepted=self._accepted, damaged=self._damaged, deadly=self._deadly, expected=self._expected
                )
                books.check(self._client(self._direct), self._report)
                self._report.problems += suspicious_lines(folder)
        self._report.seconds = time.monotonic() - started
        return self._report

    def _books(self) -> Books:
        return Books(accepted=self._accepted, damaged=self._damaged, deadly=self._deadly, expected=self._expected)

    # Before ---------------------------------------------------------------------------------------------

    def _settings_for(self, url: str, catalog: Path) -> Settings:
        return load_settings(
            redis_url=url,
            catalog=catalog,
            lease_s=self._plan.lease_s,
            lease_renew_s=self._plan.lease_s / 4,
            max_crashes=3,
            max_errors=3,
            _env_file=None,
        )

    def _make_crew(self, folder: Path) -> list[Member]:
        environment = environment_of(self._settings) | {"LATENTQ_LOG_LEVEL": "WARNING", "LATENTQ_LOG_FORMAT": "json"}
        places = [("worker", 0), ("worker", 1), ("janitor", 0), ("janitor", 1)]
        return [
            Member(kind=kind, number=number, environment=environment, log=folder / f"{kind}-{number}.log")
            for kind, number in places
        ]

    def _client(self, settings: Settings) -> DecodeClient:
        assert settings.redis_url is not None
        connections = connect_url(settings.redis_url.get_secret_value(), name="latentq-chaos")
        return DecodeClient(connections, settings=settings, catalog=VaeCatalog.load(settings.catalog))

    def _wait_for_worker(self) -> None:
        client = self._client(self._direct)
        wait_until(lambda: client.store.served({"sd"}), timeout_s=120, what="a worker")

    @staticmethod
    def _latents(variant: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        side = 8 + 4 * (variant % 3)
        return np.random.default_rng(variant).standard_normal((1, 4, side, 8)).astype(np.float32)

    def _undisturbed(self) -> dict[int, str]:
        """Digest of what each variant decodes to when nobody disturbs."""
        client = self._client(self._direct)
        jobs = [client.submit(self._latents(v), vae="sd", provenance=False) for v in range(VARIANTS)]
        for job in jobs:
            job.wait(120)
        return {number: digest(job.artifacts()[0][1]) for number, job in enumerate(jobs)}

    # The storm ------------------------------------------------------------------------------------------

    def _blow(self) -> None:
        plan = self._plan
        producer = threading.Thread(target=self._produce, name="producer")
        info = threading.Thread(target=self._rq_info, name="rq-info")
        producer.start()
        info.start()
        deadline = time.monotonic() + plan.bound_s
        while producer.is_alive() or sum(self._report.kills.values()) < plan.kills:
            if time.monotonic() > deadline:
                raise AssertionError(f"the storm took longer than {plan.bound_s} s: {self._report}")
            self._disturb()
            time.sleep(self._random.uniform(0.05, 0.5))
        producer.join()
        self._stop.set()
        info.join()
        self._stop.clear()

    def _disturb(self) -> None:
        self._revive()
        what = self._random.choices(
            ["worker", "janitor", "broker", "swallow", "cut", "cut_all", "refuse", "freeze"],
            weights=[5, 3, 2, 6, 4, 2, 1, 1],
        )[0]
        if what in ("worker", "janitor"):
            member = self._random.choice([m for m in self._crew if m.kind == what])
            self._kill(member)
        elif what == "broker":
            self._disturbed_at = time.monotonic()
            self._broker.kill()
            self._broker.restart()
            self._disturbed_at = time.monotonic()
            self._report.kills["broker"] += 1
        else:
            self._fault(what)

    def _fault(self, what: str) -> None:
        self._report.faults[what] += 1
        nth = self._random.randint(1, 30)
        if what == "swallow":
            self._proxy.swallow_reply(nth=nth)
        elif what == "cut":
            self._proxy.cut_before(nth=nth)
        elif what == "cut_all":
            self._proxy.cut_all()
        elif what == "refuse":
            self._disturbed_at = time.monotonic()
            self._proxy.refuse_for(self._random.uniform(0.1, 1.5))
        else:
            self._disturbed_at = time.monotonic()
            with self._proxy.frozen():
                time.sleep(self._random.uniform(0.1, 0.8))

    def _kill(self, member: Member) -> None:
        name = member.kill()
        self._report.kills[member.kind] += 1
        if member.kind == "worker":
            held = self._held_by(name)
            if held:
                watcher = threading.Thread(target=self._watch_requeue, args=(held, time.monotonic()), name="watch")
                watcher.start()
                self._watchers.append(watcher)
        else:
            self._disturbed_at = time.monotonic()
        member.start()

    def _revive(self) -> None:
        """Members that ended by themselves (poison, a hang) are started again, as a supervisor would."""
        for member in self._crew:
            if not member.is_alive:
                self._report.kills["by poison or fault"] += 1
                member.start()

    def _held_by(self, worker: str) -> dict[str, str]:
        """Jobs a dead worker holds, with their execution."""
        held = {}
        with redis.Redis.from_url(self._broker.url) as admin:
            for member in admin.zrange(keys.LEASES, 0, -1):
                job_id = member.decode()
                owner, state, execution = admin.hmget(keys.job(job_id), "worker", "state", "execution")
                if owner == worker.encode() and state == b"processing" and execution:
                    held[job_id] = execution.decode()
        return held

    def _watch_requeue(self, held: dict[str, str], killed_at: float) -> None:
        """Notes how long the dead worker's jobs took to be queued again (or taken by another)."""
        waiting = dict(held)
        with redis.Redis.from_url(self._broker.url) as admin:

            def all_are_back() -> bool:
                for job_id, execution in list(waiting.items()):
                    try:
                        state, now = admin.hmget(keys.job(job_id), "state", "execution")
                    except redis.RedisError:
                        continue  # the broker is being killed; asked again
                    if state != b"processing" or (now or b"").decode() != execution:
                        del waiting[job_id]
                        took = time.monotonic() - killed_at
                        clean = self._disturbed_at < killed_at - 10
                        (self._report.requeue_s if clean else self._report.requeue_disturbed_s).append(took)
                return not waiting

            try:
                wait_until(lambda: all_are_back() or self._stop.is_set(), timeout_s=60, what="a dead worker's jobs")
            except AssertionError as error:
                self._report.problems.append(f"{error}: {sorted(waiting)}")

    def _produce(self) -> None:
        """Submits through the proxy; a submit that is not known to have worked is repeated under its id."""
        plan, client = self._plan, self._client(self._settings)
        bad = self._random.sample(range(plan.jobs), plan.damaged + plan.deadly)
        damaged, deadly = set(bad[: plan.damaged]), set(bad[plan.damaged :])
        for number in range(plan.jobs):
            variant, job_id = number % VARIANTS, new_job_id()
            metadata = POISON if number in deadly else {}
            while True:
                try:
                    if number in damaged:
                        self._submit_damaged(client, job_id, variant)
                    else:
                        client.submit(
                            self._latents(variant), vae="sd", provenance=False, job_id=job_id, metadata=metadata
                        )
                    break
                except BrokerError:
                    self._report.submit_retries += 1
            self._accepted[job_id] = variant
            if number in damaged:
                self._damaged.add(job_id)
            if number in deadly:
                self._deadly.add(job_id)
            time.sleep(0.005)

    def _submit_damaged(self, client: DecodeClient, job_id: str, variant: int) -> None:
        tensor = to_tensor_file(self._latents(variant), max_bytes=1 << 20)
        options = DecodeOptions(vae="sd", provenance=False, job_id=job_id)
        request = build_request(tensor, options, catalog=client.catalog, settings=self._settings)
        client.blobs.put(request.latents.name, b"\0" * len(tensor.data))
        client.store.submit(request)

    def _rq_info(self) -> None:
        """Stock `rq info` all the while: it sweeps RQ's registries."""
        command = [str(Path(sys.executable).parent / "rq"), "info", "--url", self._broker.url]
        while not self._stop.wait(2.0):
            subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False)
            self._report.rq_info_runs += 1

    # After ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Waits until every job has ended."""
        self._say(f"settling: {len(self._accepted)} jobs, {dict(self._report.kills)}")
        self._proxy.reset()
        client = self._client(self._direct)
        waiting = set(self._accepted)
        running: list[JobSnapshot] = []

        def all_have_ended() -> bool:
            self._revive()
            try:
                snapshots = client.store.snapshots(sorted(waiting)[:500])
            except LatentqError as error:
                raise AssertionError(f"an accepted job is gone: {error}") from error
            waiting.difference_update(item.job_id for item in snapshots if item.status.is_terminal)
            running[:] = [item for item in snapshots if not item.status.is_terminal]
            return not waiting

        try:
            wait_until(all_have_ended, timeout_s=self._plan.bound_s, what="the end of every job")
        except AssertionError as error:
            stuck = [(i.job_id, i.status, i.worker, i.attempts, i.errors) for i in running[:5]]
            raise AssertionError(f"{error}; {len(waiting)} do not end, {stuck}") from error

    def _calm(self) -> None:
        """How fast idle workers take jobs, by the broker's clock."""
        client = self._client(self._direct)
        for _ in range(_PICKUPS):
            self._wait_for_crew(client)
            job = client.submit(self._latents(0), vae="sd", provenance=False)
            self._accepted[job.id] = 0
            job.wait(60)
            self._report.pickup_s.append(self._times_of(job.id)[1])
        for _ in range(self._plan.takeovers):
            self._wait_for_crew(client)
            self._take_over(client)

    def _take_over(self, client: DecodeClient) -> None:
        """A job that kills each worker that takes it: notes how soon the next one has it."""
        job = client.submit(self._latents(0), vae="sd", provenance=False, metadata=POISON)
        self._accepted[job.id] = 0
        self._deadly.add(job.id)
        seen, back_s, ready = 1, 0.0, False

        def has_ended() -> bool:
            nonlocal seen, back_s, ready
            self._revive()
            attempts, took = self._times_of(job.id)
            if attempts == seen and took < 0:  # queued again after its worker died, right after it had started it
                back_s = -took
            elif attempts > seen and took >= 0:
                seen = attempts
                self._report.takeover_s += [took] if ready else []
                self._report.requeue_s += [back_s] if back_s else []
            else:  # the lease of the dead worker runs out
                ready = self._ready(client) > 0
            return job.status().is_terminal

        # Looked at often: between two workers it is queued for two milliseconds.
        wait_until(has_ended, timeout_s=120, every_s=0.001, what="the end of a job that kills its worker")

    def _wait_for_crew(self, client: DecodeClient) -> None:
        """Both workers are up and wait for work."""
        workers = sum(member.kind == "worker" for member in self._crew)

        def all_wait() -> bool:
            self._revive()
            return self._ready(client) == workers

        wait_until(all_wait, timeout_s=60, what="both workers")

    @staticmethod
    def _ready(client: DecodeClient) -> int:
        """Workers that wait for the doorbell."""
        clients = client.store.connections.commands.client_list()
        return sum(item["cmd"] == "blpop" and "b" in item["flags"] for item in clients)

    def _times_of(self, job_id: str) -> tuple[int, float]:
        """Attempts so far, and seconds from queued to started."""
        with redis.Redis.from_url(self._broker.url) as admin:
            attempts, queued_ms, started_ms = admin.hmget(keys.job(job_id), "attempts", "queued_ms", "started_ms")
        return int(attempts or 0), (int(started_ms or 0) - int(queued_ms or 0)) / 1000
