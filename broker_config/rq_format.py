"""RQ 3.0's formats that latentq writes or reads itself: job hash, job data, results.

RQ calls these undocumented, so they stand here and in `worker/rq_adapter.py` only, pinned to `rq>=3.0,<3.1`;
`tests/contract/test_told_twice.py` compares what we leave in the broker with what a stock worker leaves.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64encode
from datetime import UTC, datetime
from typing import Any, Final

from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import utcformat

from broker_config.errors import UnsupportedMessage
from broker_config.messages import DECODE_FUNCTION, ENCODE_FUNCTION, DecodeRequest, Kind

#: A job's data is ~100 bytes; a larger one was not written by us, and zlib can blow up a thousandfold.
_MAX_DATA_BYTES: Final = 64 * 1024


def job_fields(request: DecodeRequest, *, queue: str, connection: Redis) -> list[bytes | str | int | float]:
    """Flat field, value … of `rq:job:<id>` for a job that waits in `queue`."""
    job = Job.create(
        func=ENCODE_FUNCTION if request.kind is Kind.ENCODE else DECODE_FUNCTION,
        args=[request.job_id],
        connection=connection,
        id=request.job_id,
        timeout=max(1, round(request.timeout_s)),
        result_ttl=max(1, round(request.retention_s)),
        failure_ttl=max(1, round(request.retention_s)),
        description=f"{request.kind} {request.vae} {request.width}x{request.height} to {request.output}",
        origin=queue,
        serializer=JSONSerializer,
    )
    fields: dict[str, Any] = job.to_dict()
    fields["status"] = "queued"
    fields["enqueued_at"] = utcformat(datetime.now(UTC))
    flat: list[bytes | str | int | float] = []
    for name, value in fields.items():
        flat += [name, value]
    return flat


def called_function(data: bytes) -> str:
    """Name of the function a job's `data` asks for. Nothing is imported.

    Raises:
        UnsupportedMessage: not JSON of the form RQ's JSONSerializer writes.
    """
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(data, _MAX_DATA_BYTES)
        name, instance, args, kwargs = json.loads(text)
    except (zlib.error, ValueError, TypeError) as error:
        raise UnsupportedMessage(f"the job's data cannot be read: {error}") from error
    if not isinstance(name, str) or instance is not None or not isinstance(args, list) or kwargs:
        raise UnsupportedMessage("the job's data is not a call this worker knows")
    return name


def return_value(value: object) -> str:
    """A result's `return_value` as RQ's stream holds it."""
    return b64encode(JSONSerializer.dumps(value)).decode()


def exc_string(text: str) -> str:
    """A result's `exc_string` as RQ's stream holds it."""
    return b64encode(zlib.compress(text.encode())).decode()
