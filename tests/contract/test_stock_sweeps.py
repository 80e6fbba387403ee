"""RQ's own sweeps, whenever and by whatever clock they run, end no job of ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import pytest
from rq.intermediate_queue import IntermediateQueue
from rq.registry import (
    FinishedJobRegistry,
    StartedJobRegistry,
)
from rq.serializers import JSONSerializer
from rq.worker import Worker

from broker_config import keys
from broker_config.claims import Outcome
from broker_config.job_status import JobStatus
from tests.support.broker_contents import assert_same, everything
from tests.support.rq_side import DAY_S, QUEUE, Side
from tests.support.wait import wait_until

# Stock sweeps --------------------------------------------------------------------------------------------------


def _info(side: Side) -> None:
    assert side.rq_info()[0] == "queue latentq.sd.normal 0, 1 executing, 0 finished, 0 failed"


def _count(side: Side) -> None:
    assert side.registry(StartedJobRegistry).count == 1


def _ids(side: Side) -> None:
    assert side.registry(StartedJobRegistry).get_job_ids() == ["job"]


def _clock_20_s_ahead(side: Side) -> None:
    side.registry(StartedJobRegistry).cleanup(timestamp=time.time() + 20)


def _clock_a_day_ahead(side: Side) -> None:
    side.registry(StartedJobRegistry).cleanup(timestamp=time.time() + DAY_S)


def _clock_a_century_ahead(side: Side) -> None:
    side.registry(StartedJobRegistry).cleanup(timestamp=time.time() + 36_525 * DAY_S)


def _stock_maintenance(side: Side) -> None:
    worker = side.stock_worker("stock")
    worker.clean_registries()
    worker.clean_registries()


def _left_in_the_intermediate_queue(side: Side) -> None:
    """As a stock worker leaves it that died between pop and start; RQ fails such a job after a minute."""
    intermediate = IntermediateQueue(keys.rq_queue(QUEUE), connection=side.admin)
    side.admin.rpush(intermediate.key, "job")
    side.admin.set(intermediate.get_first_seen_key("job"), time.time() - 120, ex=DAY_S)
    side.stock_worker("stock").clean_registries()
    side.admin.delete(intermediate.key)


def _all_executions_of_the_worker(side: Side) -> None:
    for worker in Worker.all(connection=side.admin, serializer=JSONSerializer):
        assert [item.job_id for item in worker.get_current_executions()] == ["job"]


SWEEPS: Final = (
    _info,
    _count,
    _ids,
    _clock_20_s_ahead,
    _clock_a_day_ahead,
    _clock_a_century_ahead,
    _stock_maintenance,
    _left_in_the_intermediate_queue,
    _all_executions_of_the_worker,
)


@pytest.mark.parametrize("adopted", [False, True], ids=["claimed", "taken-up-again"])
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: sweep.__name__.strip("_"))
def test_no_stock_sweep_ends_a_live_job(side: Side, sweep: Callable[[Side], None], adopted: bool) -> None:
    side.submit("job")
    with side.presence() as presence:
        worker = side.worker(lease_s=0.1) if adopted else side.worker()
        claim = worker.claim_one()
        if adopted:
            wait_until(lambda: worker.store.reap("janitor", quiet_s=3600).jobs, what="the lease to end")
            assert worker.renew(claim) == ["adopted"]
        presence.show(busy=True)
        sweep(side)
        assert side.state("job") is JobStatus.PROCESSING
        assert side.fetch("job").get_status() == "started"
        assert side.listed() == {"Started": ["job"]}
        assert worker.renew(claim) == ["renewed"]
        assert worker.succeed(claim) is Outcome.COMPLETED
    assert side.fetch("job").is_finished


def test_no_stock_sweep_of_its_registries_ends_a_jobs_retention(side: Side) -> None:
    side.submit("job")
    worker = side.worker()
    worker.succeed(worker.claim_one())
    before = everything(side.admin)
    side.stock_worker("stock").clean_registries()
    side.registry(FinishedJobRegistry).cleanup(timestamp=time.time() + 20)
    assert_same(before, everything(side.admin))
