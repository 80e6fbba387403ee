"""What we call of RQ and read of it is what it was when we looked: RQ does not document it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job
from rq.results import Result
from rq.serializers import JSONSerializer
from rq.utils import utcformat
from rq.worker import BaseWorker, WorkerStatus

from tests.support.rq_side import Side

# What of RQ we call --------------------------------------------------------------------------------------------


def _parameters(function: Callable[..., Any]) -> str:
    return ", ".join(
        str(parameter.replace(annotation=parameter.empty))
        for parameter in inspect.signature(function).parameters.values()
    )


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            Job.create,
            "func, args=None, kwargs=None, connection=None, result_ttl=None, ttl=None, status=None, description=None, "
            "depends_on=None, timeout=None, retry=None, id=None, origin='', meta=None, failure_ttl=None, "
            "serializer=None, group_id=None, on_success=None, on_failure=None, on_stopped=None, webhooks=None",
        ),
        (Job.to_dict, "self, include_meta=True, include_result=True"),
        (
            BaseWorker.__init__,
            "self, queues, name=None, default_result_ttl=500, connection=None, exception_handlers=None, "
            "maintenance_interval=600, default_worker_ttl=None, worker_ttl=None, job_class=None, queue_class=None, "
            "log_job_description=True, job_monitoring_interval=30, disable_default_exception_handler=False, "
            "prepare_for_work=True, serializer=None, work_horse_killed_handler=None",
        ),
        (BaseWorker._set_connection, "self, connection"),
        (BaseWorker.register_birth, "self"),
        (BaseWorker.register_death, "self"),
        (BaseWorker.heartbeat, "self, timeout=None, pipeline=None"),
        (BaseWorker.set_state, "self, state, pipeline=None"),
        (utcformat, "dt"),
        (JSONSerializer.dumps, "*args, **kwargs"),
        (JSONSerializer.loads, "s, *args, **kwargs"),
    ],
    ids=lambda given: getattr(given, "__qualname__", ""),
)
def test_what_we_call_of_rq_takes_what_we_give_it(function: Callable[..., Any], parameters: str) -> None:
    assert _parameters(function) == parameters


def test_what_we_read_of_rq_is_what_it_was(side: Side) -> None:
    assert version("rq").startswith("3.0.")
    assert RQ_KEY_PREFIX == "rq"
    worker = side.stock_worker("w")
    assert (worker.key, worker.pubsub_channel_name, worker.executions_key) == (
        "rq:worker:w",
        "rq:pubsub:w",
        "rq:worker:w:executions",
    )
    assert [state.value for state in WorkerStatus] == ["started", "suspended", "busy", "idle"]
    assert {kind.name: kind.value for kind in Result.Type} == {
        "SUCCESSFUL": 1,
        "FAILED": 2,
        "STOPPED": 3,
        "RETRIED": 4,
        "MAX_RETRIES_EXCEEDED": 5,
    }
    assert JSONSerializer.loads(JSONSerializer.dumps({"a": [1]})) == {"a": [1]}
