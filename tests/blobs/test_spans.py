"""A part of a blob, without the rest of it: from the broker, a folder and a bucket."""

from __future__ import annotations

import dataclasses

import pytest
import redis

from broker_config import keys
from broker_config.blob_store import REDIS_STORE
from broker_config.errors import BlobCorrupt, BlobMissing
from broker_config.external_store import ExternalStore
from broker_config.tiered_blob_store import TieredBlobStore
from tests.blobs.conftest import THRESHOLD_BYTES


@pytest.mark.parametrize("times", [1, THRESHOLD_BYTES], ids=["in the broker", "outside"])
def test_a_span_is_the_slice(tiers: TieredBlobStore, times: int) -> None:
    data = bytes(range(256)) * times
    ref = tiers.put("picture", data)
    assert (ref.store == REDIS_STORE) is (times == 1)
    for first, end in ((0, 1), (0, len(data)), (100, 101), (200, 256), (len(data) - 7, len(data))):
        assert tiers.get_span(ref, (first, end)) == data[first:end]


@pytest.mark.parametrize("times", [1, THRESHOLD_BYTES], ids=["in the broker", "outside"])
def test_a_span_of_what_is_gone_or_shorter_than_it_should_be(
    tiers: TieredBlobStore, outer: ExternalStore, admin: redis.Redis, times: int
) -> None:
    data = bytes(range(256)) * times
    ref = tiers.put("picture", data)
    longer = dataclasses.replace(ref, size_bytes=len(data) + 10)
    with pytest.raises(BlobCorrupt):
        tiers.get_span(longer, (len(data) - 5, len(data) + 5))
    admin.delete(keys.blob(ref.name))
    if ref.store != REDIS_STORE:
        outer.delete([ref.name])
    with pytest.raises(BlobMissing):
        tiers.get_span(ref, (0, 5))
