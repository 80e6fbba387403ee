"""The ways a submit takes, command by command, and what it must leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors

from broker_config import keys
from broker_config.messages import DecodeRequest

_HANDSHAKE: Final = ("HELLO", "CLIENT", "CLIENT", "CLIENT", "CLIENT")
#: A script that the broker does not know yet.
_NEW_SCRIPT: Final = ("EVALSHA", "SCRIPT", "EVALSHA")


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of latents into the broker."""

    latents: np.ndarray[Any, Any]
    #: Every command of one submit by a client that has no connection yet, to a broker that has no script yet.
    commands: tuple[str, ...]

    @property
    def reserved_bytes(self) -> int:
        """A VAE that enlarges by 8, with 2 bytes reserved for each pixel of a PNG."""
        rows, columns = self.latents.shape[-2:]
        return int(rows * columns) * 64 * 2


LATENTS: Final = np.random.default_rng(7).standard_normal((1, 4, 8, 8)).astype(np.float32)
SMALL: Final = Way(latents=LATENTS, commands=(*_HANDSHAKE, *_NEW_SCRIPT))
LARGE: Final = Way(
    latents=np.random.default_rng(7).standard_normal((1, 4, 272, 272)).astype(np.float32),
    commands=(*_HANDSHAKE, *_NEW_SCRIPT, *_HANDSHAKE, "MULTI", "SET", "PEXPIRE", "EXEC", *_NEW_SCRIPT),
)
WAYS: Final = [pytest.param(SMALL, id="small"), pytest.param(LARGE, id="large")]
POINTS: Final = [
    pytest.param(way, n, id=f"{label}-{n:02}-{name}")
    for label, way in (("small", SMALL), ("large", LARGE))
    for n, name in enumerate(way.commands, start=1)
]
QUEUE: Final = "rq:queue:latentq.sd.normal"


def assert_accepted_once(admin: Any, job_id: str, way: Way = SMALL) -> None:
    """The broker holds one queued job with these latents, whole, once, and nothing else."""
    record = {name.decode(): value for name, value in admin.hgetall(keys.job(job_id)).items()}
    request = DecodeRequest.from_wire(record["message"])
    blob = request.latents.name
    assert set(admin.scan_iter()) == {
        key.encode()
        for key in (
            keys.job(job_id),
            keys.rq_job(job_id),
            keys.blob(blob),
            keys.owners(blob),
            keys.TOTALS,
            keys.SUBMITTED,
            keys.bell("sd"),
            QUEUE,
            "rq:queues",
        )
    }
    assert admin.lrange(QUEUE, 0, -1) == [job_id.encode()]
    assert admin.zrange(keys.owners(blob), 0, -1) == [job_id.encode()]
    assert admin.zscore(keys.owners(blob), job_id) == float("inf")
    data = admin.get(keys.blob(blob))
    assert isinstance(data, bytes)
    (tensor,) = load_safetensors(data).values()
    np.testing.assert_array_equal(tensor, way.latents)
    assert (request.job_id, request.latents.size_bytes) == (job_id, len(data))
    assert admin.hgetall(keys.TOTALS) == {
        b"jobs": b"1",
        b"latents_bytes": str(len(data)).encode(),
        b"reserved_bytes": str(way.reserved_bytes).encode(),
        b"px": record["px"],
    }
    assert record["state"] == b"queued"
    assert admin.hget(keys.rq_job(job_id), "status") == b"queued"
    for key in (keys.job(job_id), keys.rq_job(job_id), keys.blob(blob), keys.owners(blob)):
        assert admin.ttl(key) == -1, key
