"""Every process of a broker uses one store, and notices when it does not: promise 1 would not survive a second one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis

from broker_config import keys
from broker_config.blob_store import REDIS_STORE
from broker_config.errors import (
    BlobCorrupt,
    BlobMissing,
    BlobStoreUnavailable,
    BlobStoreUnknown,
    ConfigurationError,
)
from broker_config.external_index import ExternalIndex
from broker_config.external_store import ID_NAME, ExternalStore
from broker_config.file_store import FileStore
from broker_config.messages import BlobRef
from broker_config.settings import Settings
from broker_config.tiered_blob_store import TieredBlobStore
from tests.support.external_stores import names_in

LARGE = b"x" * 2000
OpenTiers = Callable[[Settings], TieredBlobStore]


def test_small_blobs_lie_in_the_broker_and_large_ones_in_the_store(
    tiers: TieredBlobStore, outer: ExternalStore, admin: redis.Redis, settings: Settings
) -> None:
    edge = b"x" * settings.blob_threshold_bytes
    small, large = tiers.put("small", edge), tiers.put("large", edge + b"x")
    assert small.store == REDIS_STORE
    assert large.store == outer.read_id()
    assert names_in(outer) == {large.name}
    assert admin.keys(keys.blob("*")) == [keys.blob("small").encode()]
    assert tiers.get(small) == edge
    assert tiers.get(large) == edge + b"x"


def test_without_a_store_every_blob_lies_in_the_broker(settings: Settings, open_tiers: OpenTiers) -> None:
    plain = open_tiers(settings.model_copy(update={"blob_store": None}))
    plain.verify()
    ref = plain.put("large", LARGE)
    assert ref.store == REDIS_STORE
    assert plain.get(ref) == LARGE
    assert plain.external() is None


def test_a_second_process_finds_the_store_that_the_first_has_made(
    tiers: TieredBlobStore, settings: Settings, open_tiers: OpenTiers
) -> None:
    ref = tiers.put("large", LARGE)
    other = open_tiers(settings)
    other.verify()
    assert other.get(ref) == LARGE
    assert other.put("another", LARGE).store == ref.store


def test_a_name_is_never_used_twice(tiers: TieredBlobStore) -> None:
    assert tiers.put("same", LARGE).name != tiers.put("same", LARGE).name


def test_a_message_names_a_store_by_its_id_alone(tiers: TieredBlobStore, settings: Settings) -> None:
    ref = tiers.put("large", LARGE)
    assert len(ref.store) == 32
    assert int(ref.store, 16) >= 0
    assert "/" not in ref.name


# Damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [LARGE[:-1], LARGE + b"x", b"y" + LARGE[1:], b""])
def test_bytes_that_are_not_what_was_stored_are_never_handed_out(
    tiers: TieredBlobStore, outer: ExternalStore, damage: bytes
) -> None:
    ref = tiers.put("large", LARGE)
    outer.write(ref.name, damage)
    with pytest.raises(BlobCorrupt):
        tiers.get(ref)


def test_a_blob_that_is_gone_is_missing_and_one_whose_store_is_gone_may_come_back(
    file_place: dict[str, Any], settings: Settings, tmp_path: Path, open_tiers: OpenTiers
) -> None:
    tiers = open_tiers(settings.model_copy(update=file_place))
    ref, gone = tiers.put("large", LARGE), tiers.put("gone", LARGE)
    opened = tiers.external()
    assert opened is not None
    opened.store.delete([gone.name])
    with pytest.raises(BlobMissing, match="its retention ended"):
        tiers.get(gone)
    folder = tmp_path / "blobs"
    away = [path for path in folder.rglob("*") if path.is_file()]
    for path in away:
        path.rename(tmp_path / path.name)
    with pytest.raises(BlobStoreUnavailable, match="is it still mounted"):
        tiers.get(ref)
    for path in away:
        (tmp_path / path.name).rename(path)
    assert tiers.get(ref) == LARGE


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", ID_NAME + "/x", ""])
def test_a_message_cannot_name_a_file_outside_the_store(tiers: TieredBlobStore, name: str) -> None:
    ref = tiers.put("large", LARGE)
    with pytest.raises(BlobMissing):
        tiers.get(BlobRef(store=ref.store, name=name, sha256=ref.sha256, size_bytes=ref.size_bytes))


# Another store -----------------------------------------------------------------------------------------------


def test_another_folder_with_another_id_is_an_error_of_configuration(
    tiers: TieredBlobStore, settings: Settings, tmp_path: Path, open_tiers: OpenTiers
) -> None:
    tiers.verify()
    FileStore(tmp_path / "other").create_id(uuid4().hex)
    other = open_tiers(settings.model_copy(update={"blob_store": (tmp_path / "other").as_uri()}))
    for act in (other.verify, lambda: other.put("large", LARGE), other.external):
        with pytest.raises(ConfigurationError, match="must lead every process to the same store"):
            act()
    assert other.put("small", b"x").store == REDIS_STORE


def test_an_empty_folder_in_place_of_the_store_is_noticed_and_stays_empty(
    tiers: TieredBlobStore, settings: Settings, tmp_path: Path, open_tiers: OpenTiers
) -> None:
    """The same path on another host, or the mount point of a disk that is not mounted."""
    tiers.verify()
    other = open_tiers(settings.model_copy(update={"blob_store": (tmp_path / "empty").as_uri()}))
    with pytest.raises(ConfigurationError, match="is empty: is it mounted here"):
        other.verify()
    assert not (tmp_path / "empty").exists()


def test_a_store_of_another_broker_is_refused(
    tiers: TieredBlobStore, settings: Settings, admin: redis.Redis, open_tiers: OpenTiers
) -> None:
    tiers.put("large", LARGE)
    admin.flushall()  # a broker that never saw this store, or lost its data
    with pytest.raises(ConfigurationError, match="belongs to another broker"):
        open_tiers(settings).verify()
    assert admin.keys("latentq:stores") == []


def test_a_process_without_the_setting_is_told_at_its_start_and_when_it_meets_such_a_blob(
    tiers: TieredBlobStore, settings: Settings, open_tiers: OpenTiers
) -> None:
    plain = open_tiers(settings.model_copy(update={"blob_store": None}))
    plain.verify()
    ref = tiers.put("large", LARGE)
    with pytest.raises(ConfigurationError, match="LATENTQ_BLOB_STORE is not set here"):
        plain.verify()
    with pytest.raises(BlobStoreUnknown, match="set LATENTQ_BLOB_STORE") as caught:
        plain.get(ref)
    assert isinstance(caught.value, BlobMissing)


def test_a_blob_in_a_store_nobody_knows_is_missing(
    tiers: TieredBlobStore, settings: Settings, open_tiers: OpenTiers
) -> None:
    unknown = BlobRef(store="0" * 32, name="x", sha256="0" * 64, size_bytes=1)
    for blobs in (tiers, open_tiers(settings.model_copy(update={"blob_store": None}))):
        with pytest.raises(BlobMissing, match="the broker does not know"):
            blobs.get(unknown)


def test_a_running_process_whose_broker_forgot_the_store_waits_instead_of_failing_jobs(
    tiers: TieredBlobStore, outer: ExternalStore, admin: redis.Redis
) -> None:
    ref = tiers.put("large", LARGE)
    admin.delete(keys.STORES)
    with pytest.raises(BlobStoreUnavailable, match="does not know blob store"):
        tiers.put("another", LARGE)
    assert names_in(outer) == {ref.name}


# Setting up --------------------------------------------------------------------------------------------------


def test_a_setup_that_was_killed_before_the_id_was_written_is_done_again(
    tiers: TieredBlobStore, outer: ExternalStore, connections: Any
) -> None:
    assert ExternalIndex(connections).register(url="file:///x", found=None).word == "create"
    tiers.verify()
    registered = tiers.index.registered()
    assert registered is not None
    assert registered == (outer.read_id(), outer.url)


def test_a_setup_that_was_killed_after_the_id_was_written_is_taken_up(
    tiers: TieredBlobStore, outer: ExternalStore, connections: Any
) -> None:
    given = ExternalIndex(connections).register(url=outer.url, found=None)
    outer.create_id(given.store_id)
    tiers.verify()
    assert tiers.index.registered() == (given.store_id, outer.url)


def test_of_many_that_set_up_one_store_at_one_moment_all_agree(
    settings: Settings, file_place: dict[str, Any], open_tiers: OpenTiers
) -> None:
    """In a folder: moto looks and then writes, so with it, unlike with S3, two conditional writes may both win."""
    settings = settings.model_copy(update=file_place)
    barrier = threading.Barrier(6)
    stores: list[str] = []
    errors: list[BaseException] = []

    def start(blobs: TieredBlobStore) -> None:
        barrier.wait()
        try:
            stores.append(blobs.put("large", LARGE).store)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=(open_tiers(settings),), name="starter") for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(stores) == 6
    assert len(set(stores)) == 1


def test_of_two_hosts_that_set_up_folders_of_their_own_at_one_moment_one_is_told(
    settings: Settings, tmp_path: Path, connections: Any
) -> None:
    index = ExternalIndex(connections)
    folders = [FileStore(tmp_path / host) for host in ("a", "b")]
    given = [index.register(url="file:///same/path", found=None) for _ in folders]
    for folder, registration in zip(folders, given, strict=True):
        folder.create_id(registration.store_id)
    words = [index.register(url="file:///same/path", found=folder.read_id()).word for folder in folders]
    assert words == ["ours", "other"]
    assert index.register(url="file:///same/path", found=folders[0].read_id()).word == "ours"
    for folder in folders:
        folder.close()
