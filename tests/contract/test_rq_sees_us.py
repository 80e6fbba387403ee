"""What RQ's own eyes see of our jobs and workers, and its commands that reach them."""

from __future__ import annotations

from rq.command import send_shutdown_command, send_stop_job_command
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.worker import Worker

from broker_config.job_status import JobStatus
from broker_config.messages import DECODE_FUNCTION, Mode
from tests.support.rq_side import QUEUE, Side, facts_of
from tests.support.wait import wait_until

# What RQ's own eyes see ----------------------------------------------------------------------------------------


def test_rq_sees_a_job_wait_run_and_succeed(side: Side) -> None:
    job = side.submit("job")
    assert job.func_name == DECODE_FUNCTION
    assert job.args == ["job"]
    assert (job.get_status(), job.get_position(), job.origin) == ("queued", 0, QUEUE)
    assert (side.queue.count, side.queue.job_ids, side.listed()) == (1, ["job"], {})
    assert job.latest_result() is None
    with side.presence() as presence:
        worker = side.worker()
        claim = worker.claim_one()
        presence.show(busy=True)
        running = side.fetch("job")
        assert (running.get_status(), running.worker_name) == ("started", "worker-a")
        assert running.started_at is not None
        assert running.ended_at is None
        assert [execution.id for execution in running.get_executions()] == [claim.execution]
        assert (side.queue.count, side.listed()) == (0, {"Started": ["job"]})
        (seen,) = Worker.all(connection=side.admin, serializer=JSONSerializer)
        assert (seen.name, seen.get_state(), seen.queue_names()) == ("worker-a", "busy", [QUEUE])
        assert [(item.job_id, item.worker_name) for item in seen.get_current_executions()] == [("job", "worker-a")]
        current = seen.get_current_job()
        assert current is not None
        assert current.id == "job"
        queue_line, worker_line = side.rq_info()
        assert queue_line == "queue latentq.sd.normal 0, 1 executing, 0 finished, 0 failed"
        assert " busy latentq.sd.normal. jobs: 0 finished, 0 failed" in worker_line
        assert side.state("job") is JobStatus.PROCESSING

        name = worker.result(claim).artifacts[0].blob.name
        worker.succeed(claim)
        presence.show(busy=False)
        done = side.fetch("job")
        result = done.latest_result()
        assert result is not None
        assert (result.type, result.return_value) == (Result.Type.SUCCESSFUL, [name])
        assert done.return_value() == [name]
        assert (result.worker_name, result.execution_id) == ("worker-a", claim.execution)
        assert done.ended_at is not None
        assert done.started_at is not None
        assert done.enqueued_at is not None
        assert done.started_at <= done.ended_at
        assert result.execution_ended_at == done.ended_at
        assert (done.get_status(), done.is_finished, side.listed()) == ("finished", True, {"Finished": ["job"]})
        assert done.get_executions() == []
        (seen,) = Worker.all(connection=side.admin, serializer=JSONSerializer)
        assert (seen.get_state(), seen.successful_job_count, seen.failed_job_count) == ("idle", 1, 0)
        assert seen.get_current_executions() == []
        queue_line, worker_line = side.rq_info()
        assert queue_line == "queue latentq.sd.normal 0, 0 executing, 1 finished, 0 failed"
        assert " idle latentq.sd.normal. jobs: 1 finished, 0 failed" in worker_line
    assert Worker.all(connection=side.admin) == []


def test_rq_sees_a_job_fail_with_its_traceback(side: Side) -> None:
    side.submit("job")
    with side.presence():
        worker = side.worker()
        worker.fail(worker.claim_one())
        (seen,) = Worker.all(connection=side.admin, serializer=JSONSerializer)
        assert (seen.successful_job_count, seen.failed_job_count) == (0, 1)
    job = side.fetch("job")
    result = job.latest_result()
    assert result is not None
    assert result.type is Result.Type.FAILED
    assert result.exc_string == "Traceback …\nDecodeFailed: the VAE raised"
    assert (job.get_status(), side.listed()) == ("failed", {"Failed": ["job"]})
    assert side.rq_info()[0] == "queue latentq.sd.normal 0, 0 executing, 0 finished, 1 failed"


def test_rq_sees_a_canceled_job(side: Side) -> None:
    job = side.submit("job")
    side.store.cancel("job")
    assert (job.get_status(), job.is_canceled) == ("canceled", True)
    assert (side.queue.count, side.listed()) == (0, {"Canceled": ["job"]})


def test_rq_sees_several_jobs_of_one_worker_at_once(side: Side) -> None:
    for name in ("one", "two", "three"):
        side.submit(name)
    with side.presence():
        claims = side.worker().claim(mode=Mode.FAST, max_jobs=2, max_px=1 << 30)
        (seen,) = Worker.all(connection=side.admin, serializer=JSONSerializer)
        assert {item.job_id for item in seen.get_current_executions()} == {"one", "two"}
        assert side.listed() == {"Started": ["one", "two"]}
        assert side.queue.job_ids == ["three"]
        side.store.release(claims)
        assert seen.get_current_executions(refresh=True) == []
        assert side.queue.job_ids == ["one", "two", "three"]


def test_a_blocking_read_of_rqs_result_wakes_when_the_job_ends(side: Side) -> None:
    job = side.submit("job")
    worker = side.worker()
    worker.succeed(worker.claim_one())
    result = job.latest_result(timeout=1)
    assert result is not None
    assert result.type is Result.Type.SUCCESSFUL


def test_rqs_stop_job_reaches_our_worker_which_cancels_the_job(side: Side) -> None:
    side.submit("job")
    stopped: list[str] = []
    with side.presence(on_stop_job=stopped.append):
        claim = side.worker().claim_one()
        wait_until(lambda: side.admin.pubsub_numsub("rq:pubsub:worker-a")[0][1] == 1, what="the worker to listen")
        send_stop_job_command(side.admin, "job", serializer=JSONSerializer)
        wait_until(lambda: stopped, what="the command")
        assert stopped == ["job"]
        side.store.cancel("job", execution=claim.execution)
    assert side.fetch("job").is_canceled
    assert side.state("job") is JobStatus.CANCELED


def test_rq_does_not_change_the_timeouts_of_our_connections(side: Side) -> None:
    pool = side.store.connections.commands.connection_pool
    before = dict(pool.connection_kwargs)
    with side.presence() as presence:
        presence.beat()
        assert presence.connection is side.store.connections.commands
    assert pool.connection_kwargs == before


def test_rqs_shutdown_reaches_our_worker(side: Side) -> None:
    told: list[str] = []
    with side.presence(on_shutdown=lambda: told.append("shutdown")):
        wait_until(lambda: side.admin.pubsub_numsub("rq:pubsub:worker-a")[0][1] == 1, what="the worker to listen")
        send_shutdown_command(side.admin, "worker-a")
        wait_until(lambda: told, what="the command")


def test_a_worker_whose_registration_expired_in_an_outage_comes_back_whole(side: Side) -> None:
    with side.presence() as presence:
        before = facts_of(side.admin)
        side.admin.delete(presence.key)
        assert Worker.all(connection=side.admin) == []
        presence.beat()
        presence.show(busy=False)
        assert facts_of(side.admin) == before
