"""The door at which bad input is refused: what a client says, and what a refusal may allocate."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import redis
import torch

from broker_config.errors import (
    InvalidJob,
    LatentqError,
)
from producer import DecodeClient

#: What a refusal may allocate: messages and a header, never latents.
LITTLE_BYTES = 1 << 20
GOOD = torch.zeros(1, 4, 8, 8)


@dataclass(frozen=True)
class Door:
    """A client, and a look at what it left in the broker."""

    client: DecodeClient
    admin: redis.Redis

    @contextlib.contextmanager
    def refuses(self, kind: type[LatentqError], *, code: str, field: str | None, words: str) -> Iterator[None]:
        """The block must raise `kind` itself, whose message has each of `words`, and leave no key behind."""
        with pytest.raises(kind) as refusal:
            yield
        error = refusal.value
        assert type(error) is kind
        assert (error.code, error.field) == (code, field)
        assert [word for word in words.split(" | ") if word not in error.message] == []
        assert "\n" not in error.message
        if isinstance(error, InvalidJob):
            assert isinstance(error, ValueError)
            assert not error.retryable
        assert self.admin.keys("*") == []


@contextlib.contextmanager
def little_allocated() -> Iterator[None]:
    """Fails if the block had more than a little allocated at any moment (numpy's arrays and bytes count)."""
    tracemalloc.start()
    try:
        yield
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < LITTLE_BYTES


def claimed(*shape: int, dtype: str = "float16") -> npt.NDArray[Any]:
    """An array of this shape that holds one number."""
    return np.broadcast_to(np.zeros((), dtype), shape)
