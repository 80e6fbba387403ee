"""The baseline of the no-op benchmark: RQ's own SimpleWorker, reading and writing the same blobs."""

from __future__ import annotations

import hashlib
import os

import redis
from rq import Queue, SimpleWorker, get_current_job
from rq.serializers import JSONSerializer

RESULT_BYTES = 64 * 64 * 3 + 96


def decode(blob: str) -> str:
    """Reads the latents, checks their digest, writes a result of the same size as ours."""
    job = get_current_job()
    assert job is not None
    data = job.connection.get(blob)
    assert isinstance(data, bytes)
    hashlib.sha256(data).hexdigest()
    result = bytes(RESULT_BYTES)
    key = f"{blob}:out:{hashlib.sha256(result).hexdigest()[:12]}"
    job.connection.set(key, result, ex=86400)
    return key


def main() -> None:
    """Works off the queue `stock` until it is empty."""
    connection = redis.Redis.from_url(os.environ["LATENTQ_REDIS_URL"])
    queue = Queue("stock", connection=connection, serializer=JSONSerializer)
    SimpleWorker([queue], connection=connection, serializer=JSONSerializer).work(burst=True, logging_level="ERROR")


if __name__ == "__main__":
    main()
