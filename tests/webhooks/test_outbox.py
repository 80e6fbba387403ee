"""A job and its delivery end together: by whichever script it ends, wherever a command or its reply is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import redis
from rq.job import Job

from broker_config import keys
from broker_config.claims import Claim
from broker_config.connection import Connections, connect_url
from broker_config.errors import (
    BrokerUnreachable,
    InvalidOption,
    QueueFull,
    WebhookSecretMissing,
    WebhooksNotConfigured,
)
from broker_config.job_status import JobStatus
from broker_config.job_store import JobStore
from broker_config.settings import Settings
from broker_config.webhook_deliveries import DeliveryState, WebhookDeliveries, delivery_id
from broker_config.webhook_outbox import WebhookOutbox
from broker_config.webhook_secrets import WebhookSecrets
from broker_config.webhooks import JOB_EVENTS, WebhookEvent
from producer import DecodeClient, JobHandle
from tests.support.broker_contents import everything
from tests.support.faulty_proxy import FaultyProxy
from tests.support.receivers import OTHER_SECRET, SECRET, CourierThread, Receiver
from tests.support.store_worker import StoreWorker
from tests.support.wait import wait_until
from tests.webhooks.conftest import LATENTS

URL = "https://hooks.example/done?for=me"
NO_OUTAGE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A job that one call away from its end."""

    job: JobHandle
    #: Makes the call, on a store of the caller's choice. Safe to repeat, as its script is.
    end: Callable[[JobStore], object]
    expected: JobStatus


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a case is made with."""

    client: DecodeClient
    worker: StoreWorker
    admin: redis.Redis

    def submit(self, **options: object) -> JobHandle:
        """A job with a webhook."""
        asked: dict[str, object] = {"webhook": URL, "webhook_secret": SECRET, **options}
        return self.client.submit(LATENTS, vae="sd", **asked)  # type: ignore[arg-type]

    def claimed(self, **options: object) -> tuple[JobHandle, Claim]:
        """A job that the worker has."""
        job = self.submit(**options)
        return job, self.worker.claim_one()

    def lapse(self, job: JobHandle) -> None:
        """The worker has fallen silent, and nobody waits out an outage any more."""
        self.client.store.reap("janitor", quiet_s=NO_OUTAGE_S)
        self.admin.hset(keys.REAPER, "grace_ms", 0)
        self.admin.zadd(keys.LEASES, {job.id: 1})


def complete(bench: Bench) -> Case:
    job, claim = bench.claimed()
    result = bench.worker.result(claim)
    return Case(job=job, end=lambda store: store.complete(claim, result), expected=JobStatus.SUCCEEDED)


def fail(bench: Bench) -> Case:
    job, claim = bench.claimed()
    error = {"code": "decode_failed", "message": "the VAE raised"}
    return Case(
        job=job,
        end=lambda store: store.fail(claim, error, retryable=False, traceback="Traceback"),
        expected=JobStatus.FAILED,
    )


def fail_canceled(bench: Bench) -> Case:
    job, claim = bench.claimed()
    bench.client.store.cancel(job.id)
    error = {"code": "decode_failed", "message": "the VAE raised"}
    return Case(
        job=job,
        end=lambda store: store.fail(claim, error, retryable=True, traceback="Traceback"),
        expected=JobStatus.CANCELED,
    )


def cancel_queued(bench: Bench) -> Case:
    job = bench.submit()
    return Case(job=job, end=lambda store: store.cancel(job.id), expected=JobStatus.CANCELED)


def cancel_running(bench: Bench) -> Case:
    job, claim = bench.claimed()
    bench.client.store.cancel(job.id)
    return Case(job=job, end=lambda store: store.cancel(job.id, execution=claim.execution), expected=JobStatus.CANCELED)


def overdue(bench: Bench) -> Case:
    job = bench.submit(start_within_s=0.001)
    wait_until(lambda: bench.client.store.now_ms() > int(bench.admin.zscore(keys.DEADLINES, job.id) or 0) + 1)
    return Case(job=job, end=lambda store: store.overdue(), expected=JobStatus.FAILED)


def claim_late(bench: Bench) -> Case:
    late = overdue(bench)
    # A claim with another token is another claim: the first one that is heard finds the job past its time.
    return Case(job=late.job, end=lambda store: StoreWorker(store).claim(), expected=JobStatus.FAILED)


def crash(bench: Bench) -> Case:
    job, claim = bench.claimed()
    bench.worker.renew(claim, stage="device")
    bench.admin.hset(keys.job(job.id), "crashes", 2)
    bench.lapse(job)
    return Case(job=job, end=lambda store: store.reap("janitor", quiet_s=NO_OUTAGE_S), expected=JobStatus.FAILED)


def reap_canceled(bench: Bench) -> Case:
    job, _ = bench.claimed()
    bench.client.store.cancel(job.id)
    bench.lapse(job)
    return Case(job=job, end=lambda store: store.reap("janitor", quiet_s=NO_OUTAGE_S), expected=JobStatus.CANCELED)


def release_canceled(bench: Bench) -> Case:
    job, claim = bench.claimed()
    bench.client.store.cancel(job.id)
    return Case(job=job, end=lambda store: store.release([claim]), expected=JobStatus.CANCELED)


def audit_canceled_with_rqs_tools(bench: Bench) -> Case:
    job = bench.submit()
    Job.fetch(job.id, connection=bench.admin, serializer="json").cancel()
    return Case(job=job, end=lambda store: store.audit([job.id], settle_s=-1), expected=JobStatus.CANCELED)


WAYS = (
    complete, fail, fail_canceled, cancel_queued, cancel_running, overdue, claim_late, crash, reap_canceled,
    release_canceled, audit_canceled_with_rqs_tools,
)  # fmt: skip


@pytest.fixture
def bench(client: DecodeClient, worker: StoreWorker, broker_url: str) -> Iterator[Bench]:
    with redis.Redis.from_url(broker_url) as admin:
        yield Bench(client=client, worker=worker, admin=admin)


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(broker_url) as between:
        yield between


@pytest.fixture
def far(proxy: FaultyProxy, settings: Settings) -> Iterator[JobStore]:
    """A store of a process that dies with the first command that is lost."""
    connections = connect_url(proxy.url, name="far", retries=0)
    yield JobStore(connections, settings)
    connections.close()


def assert_together(case: Case, deliveries: WebhookDeliveries) -> bool:
    """The job has ended and has its one delivery, or neither. Returns whether it has."""
    ended = case.job.status().is_terminal
    found = deliveries.of_job(case.job.id)
    assert [item.event for item in found] == ([WebhookEvent(case.expected)] if ended else [])
    counts = deliveries.counts()
    assert (counts.pending, counts.reserved) == ((1, 0) if ended else (0, 1))
    return ended


@pytest.mark.parametrize("fault", ["none", "cut_before", "swallow_reply"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_process_killed_at_the_command_that_ends_a_job_leaves_both_or_neither(
    way: Callable[[Bench], Case],
    fault: str,
    bench: Bench,
    far: JobStore,
    proxy: FaultyProxy,
    deliveries: WebhookDeliveries,
) -> None:
    case = way(bench)
    assert not assert_together(case, deliveries)
    far.now_ms()  # connected: the next commands are those of the call
    if fault == "none":
        case.end(far)
    else:
        # A script that a broker does not know takes three commands; the last one is the one that counts.
        far.connections.commands.script_flush()
        rule = getattr(proxy, fault)(command="EVALSHA", nth=2)
        with pytest.raises(BrokerUnreachable):
            case.end(far)
        assert rule.struck
        assert assert_together(case, deliveries) is (fault == "swallow_reply")
        case.end(bench.client.store)
    assert case.job.status() is case.expected
    assert assert_together(case, deliveries)
    case.end(bench.client.store)
    assert assert_together(case, deliveries)
    assert deliveries.of_job(case.job.id)[0].id == f"msg_{case.job.id}_{case.expected}"


# What is announced -------------------------------------------------------------------------------------------


def test_the_filter_decides_which_events_are_announced_and_each_once(
    bench: Bench, worker: StoreWorker, deliveries: WebhookDeliveries
) -> None:
    job, claim = bench.claimed(webhook_events=[str(event) for event in JOB_EVENTS])
    worker.renew(claim, stage="device", done=1, total=4)
    worker.renew(claim, stage="device", done=2, total=4)  # half a second has not passed
    worker.store.release([claim])
    again = worker.claim_one()
    worker.succeed(again)
    assert [item.event for item in deliveries.of_job(job.id)] == ["queued", "processing", "succeeded"]
    assert deliveries.show(f"{delivery_id(job.id, WebhookEvent.PROGRESS)}_1").state is DeliveryState.PENDING
    assert deliveries.counts().pending == 4


@pytest.mark.parametrize("state", ["dead", "pending", "delivered"])
def test_an_id_that_is_used_again_after_its_tombstone_has_its_own_end_told(
    bench: Bench, deliveries: WebhookDeliveries, state: str
) -> None:
    """A dead letter, or a delivery that was sent again, may outlive the tombstone of its job."""
    for turn in range(2):
        job, claim = bench.claimed(job_id="weekly", webhook=f"{URL}&turn={turn}")
        bench.worker.succeed(claim)
        found = delivery_id(job.id, WebhookEvent.SUCCEEDED)
        delivery = deliveries.show(found)
        assert (delivery.state, delivery.url) == (DeliveryState.PENDING, f"{URL}&turn={turn}")
        assert bench.admin.zcard(keys.DEAD_LETTERS) == 0
        if state != "pending":
            bench.admin.hset(keys.delivery(found), "state", state)
            bench.admin.zrem(keys.OUTBOX, found)
        if state == "dead":
            bench.admin.zadd(keys.DEAD_LETTERS, {found: 1e15})
        bench.client.store.retire(job.id)
        bench.admin.delete(keys.job(job.id), keys.attempts(job.id))  # its tombstone ends


def test_an_end_that_nobody_asked_about_is_not_announced(bench: Bench, deliveries: WebhookDeliveries) -> None:
    job = bench.submit(webhook_events="succeeded")
    bench.client.store.cancel(job.id)
    assert deliveries.of_job(job.id) == []
    counts = deliveries.counts()
    assert (counts.pending, counts.reserved) == (0, 0)


# Admission ---------------------------------------------------------------------------------------------------


def test_the_outbox_is_bounded_and_its_room_is_reserved_when_a_job_is_accepted(
    connections: Connections, settings: Settings, worker: StoreWorker, deliveries: WebhookDeliveries
) -> None:
    tight = DecodeClient(connections, settings=settings.model_copy(update={"webhook_max_pending": 2}))

    def submit() -> JobHandle:
        return tight.submit(LATENTS, vae="sd", webhook=URL, webhook_secret=SECRET, webhook_events="queued,succeeded")

    submit()  # its `queued` takes the place that is left: best effort goes where nothing is reserved
    with pytest.raises(QueueFull, match="LATENTQ_WEBHOOK_MAX_PENDING"):
        submit()
    tight.submit(LATENTS, vae="sd")  # one without a webhook needs no room
    worker.succeed(worker.claim_one())
    assert deliveries.counts().pending == 2


def test_a_receiver_for_which_much_waits_closes_the_outbox_to_itself_only(
    connections: Connections, settings: Settings
) -> None:
    tight = DecodeClient(connections, settings=settings.model_copy(update={"webhook_max_pending": 12}))

    def end(url: str) -> None:
        tight.submit(LATENTS, vae="sd", webhook=url, webhook_secret=SECRET).cancel()

    for number in range(3):
        end(f"https://hooks.example/{number}")
    with pytest.raises(QueueFull, match="this receiver"):
        end("https://hooks.example/3")
    end("https://hooks.example:8443/0")


def test_memory_for_the_delivery_is_reserved_until_it_is_written(bench: Bench) -> None:
    def reserved() -> int:
        return int(bench.admin.hget(keys.TOTALS, "reserved_bytes") or 0)

    bench.client.submit(LATENTS, vae="sd")
    without = reserved()
    bench.submit()
    assert reserved() - 2 * without == 4096 + 3 * len(URL)


def test_in_a_broker_that_is_full_the_end_of_a_job_is_written_and_delivered(
    receiver: Receiver, bench: Bench, settings: Settings, deliveries: WebhookDeliveries
) -> None:
    job, claim = bench.claimed(webhook=receiver.url)
    result = bench.worker.result(claim)
    before = str(bench.admin.config_get("maxmemory")["maxmemory"])
    bench.admin.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            bench.admin.set("latentq:test", "x", px=1)
        bench.worker.store.complete(claim, result)
        with CourierThread(settings):
            name = delivery_id(job.id, WebhookEvent.SUCCEEDED)
            wait_until(lambda: deliveries.show(name).state is DeliveryState.DELIVERED, what="the delivery")
    finally:
        bench.admin.config_set("maxmemory", before)
    assert [request.id for request in receiver.received] == [name]


def test_a_job_with_a_webhook_is_refused_while_links_cannot_be_signed(
    connections: Connections, settings: Settings
) -> None:
    for missing in ("public_url", "link_key"):
        client = DecodeClient(connections, settings=settings.model_copy(update={missing: None}))
        with pytest.raises(WebhooksNotConfigured) as caught:
            client.submit(LATENTS, vae="sd", webhook=URL, webhook_secret=SECRET)
        assert (caught.value.code, caught.value.field) == ("webhooks_not_configured", "webhook")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"webhook_events": "started"}, "webhook_events"),
        ({"webhook_events": ()}, "webhook_events"),
        ({"webhook_inline": 1}, "webhook_inline"),
        ({"webhook_secret": "hunter2"}, "webhook_secret"),
        ({"webhook_secret": "whsec_c2hvcnQ="}, "webhook_secret"),
        ({"webhook": "http://127.0.0.1:1/", "webhook_secret": None, "retention_s": 3600}, "retention_s"),
        ({"webhook": None}, "webhook_secret"),
        ({"webhook": "https://192.168.0.1/"}, "webhook"),
    ],
)
def test_options_that_do_not_fit_are_refused_and_nothing_is_stored(
    options: dict[str, object], field: str, bench: Bench
) -> None:
    with pytest.raises((InvalidOption, ValueError)) as caught:
        bench.submit(**options)
    assert getattr(caught.value, "field", None) == field
    assert "hunter2" not in str(caught.value)
    assert list(bench.admin.scan_iter()) == []


# Secrets -----------------------------------------------------------------------------------------------------


def test_a_jobs_secret_is_in_no_record_and_no_message_and_ends_with_its_delivery(bench: Bench) -> None:
    job, claim = bench.claimed(webhook_secret=f"{SECRET},{OTHER_SECRET}")
    key = keys.webhook_secret(f"job:{job.id}")
    assert [item.secret for item in WebhookSecrets(bench.client.store.connections).of(f"job:{job.id}")] == [
        SECRET,
        OTHER_SECRET,
    ]
    bench.worker.succeed(claim)
    assert 0 < bench.admin.ttl(key) <= (30 * 3600 + 604_800)
    assert SECRET in repr(everything(bench.admin))
    assert SECRET not in repr(everything(bench.admin, but=[key]))
    assert SECRET not in repr(job.snapshot())


def test_without_a_secret_a_job_takes_those_of_its_key_and_never_the_default_ones(bench: Bench) -> None:
    secrets = WebhookSecrets(bench.client.store.connections)
    with pytest.raises(WebhookSecretMissing):
        bench.submit(webhook_secret=None)
    secrets.add("default", SECRET)
    bench.submit(webhook_secret=None)
    with pytest.raises(WebhookSecretMissing):
        bench.submit(webhook_secret=None, job_id="k_abcdefgh_mine")
    secrets.add("key:abcdefgh", OTHER_SECRET)
    job = bench.submit(webhook_secret=None, job_id="k_abcdefgh_mine")
    bench.client.store.cancel(job.id)
    (due,) = WebhookOutbox(bench.client.store.connections, bench.client._settings).claim(
        token="t", courier="c", lease_s=1, most=9, most_per_receiver=9, alive_s=1
    )
    assert [item.secret for item in secrets.of(due.signer)] == [OTHER_SECRET]


def test_an_older_secret_signs_beside_a_newer_one_until_its_time_is_over(bench: Bench) -> None:
    secrets = WebhookSecrets(bench.client.store.connections)
    secrets.add("default", SECRET)
    secrets.add("default", OTHER_SECRET, overlap_s=0.3)
    assert [item.secret for item in secrets.of("default")] == [OTHER_SECRET, SECRET]
    wait_until(lambda: len(secrets.of("default")) == 1, timeout_s=5, what="the end of the older one")
    assert [item.secret for item in secrets.of("default")] == [OTHER_SECRET]
