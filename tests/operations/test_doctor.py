"""Each check of `latentq doctor` both ways, on a real broker: all is well, and the thing it is there to find.

What a test cannot do to a broker or a clock (an old version, a full disk, a slow network) is put into what was read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from broker_config import keys
from broker_config.broker_facts import read_broker_facts
from broker_config.connection import Connections
from broker_config.receiver_url import ReceiverUrl
from broker_config.settings import Settings
from broker_config.tiered_blob_store import TieredBlobStore
from broker_config.webhook_deliveries import WebhookDeliveries
from producer.doctor import Finding, Level, diagnose, observe
from producer.doctor.broker_checks import admission, blob_store, clock, disk, latency, version, writes
from producer.doctor.finding import Observations
from producer.doctor.webhook_check import webhooks
from producer.quantities import byte_size, duration
from tests.operations.conftest import Made, Of, Run, parsed

BrokerSet = Callable[[str, str], None]
CHECKS = [
    "catalogue", "broker",
    "version", "latency", "clock", "memory limit", "eviction", "aof", "fsync", "disk", "writes", "admission",
    "blob store",
    "janitor", "leases", "suspended", "unserved VAEs", "paused VAEs", "waits", "parked jobs", "lost jobs", "totals",
    "keys", "webhooks",
]  # fmt: skip


@pytest.fixture
def seen(connections: Connections, settings: Settings) -> Observations:
    """Observations of an empty broker."""
    return observe(connections, settings, long_wait_s=600, max_keys=1000)


def with_facts(seen: Observations, **facts: Any) -> Observations:
    return dataclasses.replace(seen, facts=dataclasses.replace(seen.facts, **facts))


@pytest.mark.usefixtures("janitor")
def test_a_queue_at_work_has_no_problem(made: Made, cli: Run, broker_set: BrokerSet) -> None:
    broker_set("appendfsync", "always")
    made.serving("worker-1", "sdxl", "sd")
    made.succeeded("done")
    made.failed("broken")
    made.canceled("gone")
    made.processing("runs")
    made.queued("waits")
    result = cli("doctor", "--json")
    findings = {item["check"]: item for item in parsed(result)}
    assert list(findings) == CHECKS
    assert {name for name, item in findings.items() if item["level"] != "ok"} - {"latency"} == set()
    assert result.exit_code == 0
    assert findings["totals"]["finding"] == "2 unfinished jobs, as counted"
    assert findings["leases"]["finding"] == "1 held, none overdue"


@pytest.mark.usefixtures("janitor")
def test_a_warning_alone_is_not_a_failure_and_a_problem_is(
    cli: Run, made: Made, admin: redis.Redis, broker_set: BrokerSet
) -> None:
    broker_set("appendfsync", "always")
    made.queued("held")
    cli("pause", "sdxl")
    result = cli("doctor")
    assert result.exit_code == 0
    assert "warning  paused VAEs    paused: sdxl (1 job waiting)\n" in result.stdout
    assert "                        → `latentq resume sdxl`\n" in result.stdout
    assert "24 checks: 1 warning" in result.stdout
    admin.delete(keys.JANITOR)
    result = cli("doctor")
    assert result.exit_code == 1
    assert "24 checks: 1 problem, 1 warning" in result.stdout


def test_the_doctor_changes_nothing(made: Made, cli: Run, admin: redis.Redis) -> None:
    made.failed("broken")
    made.processing("runs")
    made.queued("waits")

    readers: dict[bytes | str, Callable[[bytes], Any]] = {
        b"string": admin.get,
        b"hash": admin.hgetall,
        b"set": admin.smembers,
        b"stream": admin.xrange,
        b"list": lambda key: admin.lrange(key, 0, -1),
        b"zset": lambda key: admin.zrange(key, 0, -1, withscores=True),
    }

    def everything() -> dict[bytes, object]:
        return {key: (readers[admin.type(key)](key), admin.pexpiretime(key)) for key in admin.scan_iter(count=1000)}

    before = everything()
    cli("doctor")
    assert everything() == before


def test_without_a_broker_it_says_how_to_get_one(settings: Settings, tmp_path: Path) -> None:
    nowhere = settings.model_copy(update={"redis_url": None, "data_dir": tmp_path})
    catalogue, broker = diagnose(nowhere).findings
    assert (catalogue.level, broker.level, broker.check) == (Level.OK, Level.PROBLEM, "broker")
    assert broker.finding == "No broker is running; nothing else was checked"
    assert broker.fix == "start one with `latentq up`, or set LATENTQ_REDIS_URL."


def test_a_broker_that_does_not_answer_is_a_problem(cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENTQ_REDIS_URL", f"unix://{tmp_path}/no.sock")
    result = cli("doctor", "--json")
    assert result.exit_code == 1
    assert [(item["check"], item["level"]) for item in parsed(result)] == [("catalogue", "ok"), ("broker", "problem")]
    assert "does not answer" in parsed(result)[1]["finding"]
    assert "disk" in parsed(result)[1]["fix"]  # with `appendfsync always` a full one ends it


def test_a_catalogue_that_does_not_load_is_named(settings: Settings, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[mine]\ntitle = "no weights"\n')
    first, *others = diagnose(settings.model_copy(update={"catalog": own})).findings
    assert (first.check, first.level) == ("catalogue", Level.PROBLEM)
    assert "entry [mine]" in first.finding
    assert len(others) == len(CHECKS) - 1


def test_an_old_broker_is_a_problem(seen: Observations) -> None:
    assert version(seen).level is Level.OK
    old = version(with_facts(seen, version_fault="is Redis 6.2.14, older than 7.0"))
    assert (old.level, old.finding) == (Level.PROBLEM, "the broker is Redis 6.2.14, older than 7.0")


@pytest.mark.parametrize(("seconds", "level"), [(0.0001, Level.OK), (0.049, Level.OK), (0.2, Level.WARNING)])
def test_a_slow_network_is_a_warning(seen: Observations, seconds: float, level: Level) -> None:
    assert latency(with_facts(seen, latency_s=seconds)).level is level


@pytest.mark.parametrize(
    ("ahead_s", "level", "words"),
    [
        (0.3, Level.OK, "within 0.3 s"),
        (-1.9, Level.OK, "within 1.9 s"),
        (25.0, Level.WARNING, "25 s ahead of"),
        (-7200.0, Level.WARNING, "2 h behind"),
    ],
)
def test_a_host_whose_clock_is_off_is_a_warning(seen: Observations, ahead_s: float, level: Level, words: str) -> None:
    found = clock(with_facts(seen, clock_ahead_s=ahead_s))
    assert (found.level, words in found.finding) == (level, True)


def test_this_hosts_clock_is_the_brokers(connections: Connections) -> None:
    assert abs(read_broker_facts(connections).clock_ahead_s) < 1


def test_no_memory_limit_is_a_warning(finding: Of, broker_set: BrokerSet) -> None:
    assert finding("memory limit").finding.endswith("of 512.0 MiB used")
    broker_set("maxmemory", "0")
    assert finding("memory limit").level is Level.WARNING


def test_a_broker_that_evicts_is_a_problem(finding: Of, broker_set: BrokerSet) -> None:
    assert finding("eviction").level is Level.OK
    broker_set("maxmemory-policy", "allkeys-lru")
    assert finding("eviction").level is Level.PROBLEM
    assert "noeviction" in (finding("eviction").fix or "")
    broker_set("maxmemory", "0")
    assert finding("eviction").level is Level.WARNING


def test_a_broker_without_aof_is_a_problem(finding: Of, broker_set: BrokerSet) -> None:
    assert finding("aof").level is Level.OK
    broker_set("appendonly", "no")
    assert finding("aof").level is Level.PROBLEM
    assert finding("fsync").level is Level.OK


@pytest.mark.parametrize(
    ("policy", "level"), [("always", Level.OK), ("everysec", Level.WARNING), ("no", Level.WARNING)]
)
def test_anything_but_appendfsync_always_is_a_warning(
    finding: Of, broker_set: BrokerSet, policy: str, level: Level
) -> None:
    broker_set("appendfsync", policy)
    assert finding("fsync").level is level


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        ({}, Level.OK, "went well"),
        ({"append_ok": False}, Level.PROBLEM, "append-only file"),
        ({"rewrite_ok": False}, Level.WARNING, "AOF rewrite failed"),
        ({"rewrite_ok": False, "snapshot_ok": False}, Level.WARNING, "AOF rewrite and snapshot failed"),
    ],
)
def test_a_failing_disk_is_found(seen: Observations, facts: dict[str, bool], level: Level, words: str) -> None:
    found = disk(with_facts(seen, **facts))
    assert (found.level, words in found.finding) == (level, True)


def test_a_full_broker_and_one_without_its_replicas_refuse_writes(finding: Of, broker_set: BrokerSet) -> None:
    assert finding("writes").level is Level.OK
    broker_set("min-replicas-to-write", "1")
    assert finding("writes").level is Level.PROBLEM
    assert "min-replicas-to-write" in (finding("writes").fix or "")
    broker_set("min-replicas-to-write", "0")
    broker_set("maxmemory", "1mb")
    assert "raise maxmemory" in (finding("writes").fix or "")
    assert finding("admission").level is Level.PROBLEM


@pytest.mark.parametrize(
    ("refusal", "fix"),
    [
        ("MISCONF Errors writing to the AOF file: No space left on device", "free space"),
        ("You can't write against a read only replica.", "the primary"),
        ("this user has no permissions to run the 'eval' command", "rights"),
        ("something new", "log"),
    ],
)
def test_a_refusal_comes_with_its_fix(seen: Observations, refusal: str, fix: str) -> None:
    assert fix in (writes(with_facts(seen, write_refusal=refusal)).fix or "")


@pytest.mark.parametrize(("jobs", "level"), [(7, Level.OK), (8, Level.WARNING), (10, Level.PROBLEM)])
def test_a_queue_that_is_nearly_full_is_a_warning_and_a_full_one_a_problem(
    seen: Observations, jobs: int, level: Level
) -> None:
    narrow = dataclasses.replace(
        seen,
        settings=seen.settings.model_copy(update={"max_pending_jobs": 10}),
        totals=dataclasses.replace(seen.totals, jobs=jobs),
    )
    assert admission(narrow).level is level
    assert level is Level.OK or "LATENTQ_TOMBSTONE_S" in (admission(narrow).fix or "")


@pytest.mark.parametrize(
    ("pending", "reserved", "level"), [(4, 3, Level.OK), (4, 4, Level.WARNING), (0, 10, Level.PROBLEM)]
)
def test_webhooks_that_fill_the_outbox_close_admission_to_jobs_with_one(
    seen: Observations, pending: int, reserved: int, level: Level
) -> None:
    narrow = dataclasses.replace(
        seen,
        settings=seen.settings.model_copy(update={"webhook_max_pending": 10}),
        webhooks=dataclasses.replace(seen.webhooks, pending=pending, reserved=reserved),
    )
    found = admission(narrow)
    assert found.level is level
    assert "of LATENTQ_WEBHOOK_MAX_PENDING" in found.finding
    assert ("submits with a webhook are refused" in found.finding) == (level is Level.PROBLEM)


@pytest.mark.parametrize(("waiting", "level"), [(7, Level.OK), (8, Level.WARNING), (10, Level.PROBLEM)])
def test_a_receiver_for_which_a_quarter_of_the_webhooks_wait_is_named(
    connections: Connections, settings: Settings, waiting: int, level: Level
) -> None:
    narrow = settings.model_copy(update={"webhook_max_pending": 40})
    signer, deliveries = "default", WebhookDeliveries(connections, narrow)
    for _ in range(waiting):
        deliveries.ping(ReceiverUrl.parse("https://hooks.example/a"), signer=signer)
    deliveries.ping(ReceiverUrl.parse("https://other.example/a"), signer=signer)
    found = admission(observe(connections, narrow, long_wait_s=600, max_keys=1000))
    assert found.level is level
    assert ("https://hooks.example" in found.finding) == (level is not Level.OK)
    assert "other" not in found.finding


def test_admission_counts_stored_and_expected_bytes_against_the_watermark(seen: Observations) -> None:
    limited = with_facts(seen, max_memory_bytes=1000, used_memory_bytes=300)
    reserved = dataclasses.replace(limited, totals=dataclasses.replace(seen.totals, reserved_bytes=150))
    assert seen.settings.memory_watermark == 0.75
    assert admission(reserved).finding.startswith("60% of what submits may fill (75% of maxmemory)")


def test_the_store_of_large_blobs_must_be_the_brokers(
    connections: Connections, settings: Settings, tmp_path: Path
) -> None:
    def found(folder: Path | None) -> Finding:
        url = None if folder is None else folder.as_uri()
        here = settings.model_copy(update={"blob_store": url})
        return blob_store(observe(connections, here, long_wait_s=600, max_keys=10))

    shared, other = tmp_path / "shared", tmp_path / "other"
    assert (found(None).level, found(None).finding) == (Level.OK, "all blobs lie in the broker")
    assert found(shared).level is Level.OK
    assert not shared.exists(), "the doctor makes no store"

    opened = TieredBlobStore(connections, settings.model_copy(update={"blob_store": shared.as_uri()}))
    opened.verify()
    opened.close()
    assert (found(shared).level, found(shared).finding) == (Level.OK, f"{shared.as_uri()} is the broker's")
    assert found(None).level is Level.PROBLEM
    assert shared.as_uri() in found(None).finding
    assert found(other).level is Level.PROBLEM
    assert found(other).finding.startswith(f"{other.as_uri()} is not a store yet; the broker's is {shared.as_uri()}")
    connections.commands.delete(keys.STORES)
    assert found(shared).level is Level.PROBLEM
    assert found(shared).finding.endswith("the broker knows none")
    (shared / "latentq-store.json").write_text("{}")
    assert "damaged" in found(shared).finding


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (95, "95 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (200_000, "2 d"),
    ],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (4 << 30, "4.0 GiB"), (5 << 50, "5120.0 TiB")],
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert byte_size(count) == text


def test_webhooks_that_nobody_delivers_and_those_that_were_given_up_are_named(seen: Observations) -> None:
    def found(**counts: Any) -> Finding:
        return webhooks(dataclasses.replace(seen, webhooks=dataclasses.replace(seen.webhooks, **counts)))

    assert found().level is Level.OK
    assert found(pending=3, couriers=1).finding == "3 webhooks on the way, 1 courier"
    for waiting in ({"pending": 3}, {"reserved": 1}):
        lonely = found(**waiting)
        assert lonely.level is Level.PROBLEM
        assert "latentq courier" in str(lonely.fix)
    assert found(pending=3, couriers=1, overdue_s=59.0).level is Level.OK
    assert found(pending=3, couriers=1, overdue_s=61.0).level is Level.WARNING
    given_up = found(dead_letters=2, stopped_endpoints=1, couriers=1)
    assert (given_up.level, given_up.finding) == (Level.WARNING, "2 dead letters, 1 endpoint answered 410")
