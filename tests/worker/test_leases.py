"""The lease keeper by a clock of the test's: what counts as a hang, and what it says to the broker when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from broker_config.claims import Claim, Renewal
from broker_config.errors import BrokerUnreachable
from tests.support.wait import wait_until
from worker import leases
from worker.leases import LeaseKeeper

RENEW_S = 5.0
LIMIT_S = 60.0


def claim(name: str) -> Claim:
    return Claim(name, f"execution-{name}", b"", b"", 1, 0)


@dataclass
class Told:
    """Stands in for the broker: notes what it is told, answers what the test wants."""

    error: BaseException | None = None
    #: What it answers of each job.
    word: str = "renewed"
    #: Told before it answers.
    before_answer: Callable[[], None] = lambda: None
    #: Job → stage, of each renewal.
    said: list[dict[str, str]] = field(default_factory=list)
    #: Whether each renewal was to extend the lease.
    extended: list[bool] = field(default_factory=list)
    called: threading.Event = field(default_factory=threading.Event)

    def renew(self, worker: str, renewals: Sequence[Renewal]) -> list[str]:
        self.called.set()
        if self.error is not None:
            raise self.error
        self.said.append({item.job_id: item.stage for item in renewals})
        self.extended += [item.extend for item in renewals]
        self.before_answer()
        return [self.word] * len(renewals)


@dataclass
class Bench:
    """A keeper, its clock, its broker and the hangs it told of."""

    now: float = 1000.0
    broker: Told = field(default_factory=Told)
    hung: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        broker: Any = self.broker
        self.keeper = LeaseKeeper(
            broker,
            worker="w",
            renew_s=RENEW_S,
            on_hang=lambda claim, stage: self.hung.append((claim.job_id, stage)),
            on_beat=lambda: None,
        )

    def pass_s(self, seconds: float, *, step_s: float = RENEW_S) -> None:
        """Time passes, with its rounds."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step_s)
            self.keeper._round()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made: list[Bench] = []
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: made[0].now if made else 1000.0))
    made.append(Bench())
    return made[0]


def test_a_stage_past_its_time_is_told_once_and_no_longer_renewed(bench: Bench) -> None:
    bench.keeper.hold([claim("a"), claim("b")], limit_s=LIMIT_S)
    bench.keeper.enter([claim("b")], "device", limit_s=10 * LIMIT_S)
    bench.pass_s(LIMIT_S + 2 * RENEW_S)
    assert bench.hung == [("a", "claimed")]
    assert bench.broker.said[-1] == {"b": "device"}


def test_a_job_that_is_ready_may_wait_for_ever(bench: Bench) -> None:
    bench.keeper.hold([claim("a")], limit_s=LIMIT_S)
    bench.keeper.enter([claim("a")], "ready")
    bench.pass_s(1000 * LIMIT_S, step_s=LIMIT_S)
    assert bench.hung == []
    assert bench.broker.said[-1] == {"a": "ready"}


@pytest.mark.parametrize("stage", leases.STAGES)
def test_time_in_which_the_broker_is_away_does_not_count(bench: Bench, stage: str) -> None:
    bench.keeper.hold([claim("a")], limit_s=LIMIT_S)
    bench.keeper.enter([claim("a")], stage, limit_s=LIMIT_S)
    bench.pass_s(LIMIT_S / 2)
    bench.broker.error = BrokerUnreachable("away")
    bench.pass_s(20 * LIMIT_S)
    assert bench.hung == []
    bench.broker.error = None
    bench.pass_s(LIMIT_S / 4)
    assert (bench.hung, bench.broker.said[-1]) == ([], {"a": stage})
    bench.pass_s(LIMIT_S)
    assert bench.hung == [("a", stage)]  # and after it counts again


def test_time_that_counts_twice_leaves_no_more_than_the_stage_had(bench: Bench) -> None:
    bench.keeper.hold([claim("a")], limit_s=LIMIT_S)
    for _ in range(100):
        bench.keeper.grant(LIMIT_S)
    bench.pass_s(LIMIT_S + RENEW_S)
    assert bench.hung == [("a", "claimed")]


def test_waiting_is_granted_to_those_who_wait(bench: Bench) -> None:
    bench.keeper.hold([claim("a"), claim("b")], limit_s=LIMIT_S)
    bench.keeper.enter([claim("b")], "device", limit_s=LIMIT_S)
    bench.pass_s(LIMIT_S / 2)
    bench.keeper.grant(LIMIT_S / 2, stages=("device",))
    bench.pass_s(LIMIT_S / 2 + RENEW_S)
    assert bench.hung == [("a", "claimed")]


def test_a_decode_that_shows_progress_keeps_its_lease_and_a_silent_one_loses_it(bench: Bench) -> None:
    jobs = [claim("a"), claim("b")]
    bench.keeper.hold(jobs, limit_s=LIMIT_S)
    bench.keeper.enter(jobs, "device", limit_s=100 * LIMIT_S)
    bench.keeper.expect(jobs, within_s=LIMIT_S)
    for frame in range(10):
        bench.pass_s(LIMIT_S / 2)
        bench.keeper.progress(jobs[0], done=frame, total=10)
    assert bench.hung == [("b", "device")]
    assert bench.broker.said[-1] == {"a": "device"}
    bench.pass_s(LIMIT_S + RENEW_S)
    assert bench.hung == [("b", "device"), ("a", "device")]


def test_progress_does_not_prolong_the_time_that_a_stage_may_take(bench: Bench) -> None:
    job = claim("a")
    bench.keeper.hold([job], limit_s=LIMIT_S)
    bench.keeper.enter([job], "device", limit_s=2 * LIMIT_S)
    bench.keeper.expect([job], within_s=LIMIT_S)
    for frame in range(5):
        bench.pass_s(LIMIT_S / 2)
        bench.keeper.progress(job, done=frame, total=10)
    assert bench.hung == [("a", "device")]


def test_progress_is_expected_on_the_device_only_and_waiting_is_no_silence(bench: Bench) -> None:
    jobs = [claim("a"), claim("b"), claim("c")]
    bench.keeper.hold(jobs, limit_s=LIMIT_S)
    bench.keeper.enter(jobs, "device", limit_s=100 * LIMIT_S)
    bench.keeper.enter([jobs[0]], "encode", limit_s=100 * LIMIT_S)
    bench.keeper.expect(jobs, within_s=LIMIT_S)
    bench.keeper.enter([jobs[1]], "encode", limit_s=100 * LIMIT_S)
    for _ in range(10):
        bench.pass_s(LIMIT_S / 2)
        bench.keeper.grant(LIMIT_S / 2, stages=("device",))  # it waits for encoders
    assert bench.hung == []


def test_a_job_never_goes_back_to_an_earlier_stage(bench: Bench) -> None:
    """Two threads say where it is: the device is done with it, and it is being stored."""
    bench.keeper.hold([claim("a")], limit_s=LIMIT_S)
    bench.keeper.enter([claim("a")], "finish", limit_s=LIMIT_S)
    bench.keeper.enter([claim("a")], "encode", limit_s=LIMIT_S)
    bench.keeper._round()
    assert bench.broker.said == [{"a": "finish"}]


def test_what_else_changed_is_told_with_the_next_word(bench: Bench) -> None:
    jobs = [claim("a"), claim("b"), claim("c")]
    bench.keeper.hold(jobs, limit_s=LIMIT_S)
    bench.keeper._round()
    bench.keeper.enter([jobs[0]], "encode", limit_s=LIMIT_S)
    bench.keeper.enter([jobs[1]], "device", limit_s=LIMIT_S)
    bench.keeper.tell([jobs[1]])
    assert bench.broker.said[-1] == {"a": "encode", "b": "device"}


def test_a_job_that_was_told_as_hung_is_renewed_when_it_goes_on(bench: Bench) -> None:
    bench.keeper.hold([claim("a")], limit_s=LIMIT_S)
    bench.pass_s(LIMIT_S + RENEW_S)
    assert bench.hung == [("a", "claimed")]
    bench.keeper.enter([claim("a")], "device", limit_s=LIMIT_S)
    bench.pass_s(RENEW_S)
    assert bench.broker.said[-1] == {"a": "device"}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"), BrokerUnreachable("away")])
def test_leases_are_renewed_again_after_any_error(error: Exception) -> None:
    told: Any = Told(error=error)
    keeper = LeaseKeeper(told, worker="w", renew_s=0.01, on_hang=lambda *_: None, on_beat=lambda: None)
    keeper.hold([claim("a")], limit_s=600.0)
    keeper.start()
    try:
        assert told.called.wait(30)
        told.error = None
        wait_until(lambda: told.said, what="the next renewal")
    finally:
        keeper.stop()


def test_a_success_that_crosses_a_renewal_is_no_lost_lease(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.keeper.hold([claim("a"), claim("b")], limit_s=LIMIT_S)
    bench.broker.word = "lost"
    bench.broker.before_answer = lambda: bench.keeper.enter([claim("a")], "finish")
    bench.keeper.tell([claim("a"), claim("b")])
    assert [record.getMessage() for record in caplog.records] == ["job b is no longer ours"]


def test_only_a_round_extends_leases(bench: Bench) -> None:
    bench.keeper.hold([claim("a")], limit_s=LIMIT_S)
    bench.keeper.tell([claim("a")])
    bench.pass_s(RENEW_S)
    assert bench.broker.extended == [False, True]
