"""Servers that would lose jobs are refused; defaults of the embedded one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import redis

from broker_config.broker_folder import BrokerState, default_data_dir
from broker_config.embedded_broker import EmbeddedBroker, default_max_memory_bytes
from broker_config.errors import (
    BrokerUnreachable,
    BrokerUnsupported,
)
from broker_config.supported_servers import verify_server
from tests.support.embedded_brokers import (
    client_of,
)

# Any server ---------------------------------------------------------------------------------------------


def claims(**info: object) -> redis.Redis:
    return cast(redis.Redis, SimpleNamespace(info=lambda section: info))


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({"redis_version": "7.0.0"}, "Redis 7.0.0"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.3"}, "Valkey 8.1.3"),
        ({"redis_version": "7.2.4", "server_name": "valkey"}, "Valkey 7.2.4"),
        ({"redis_version": "8.0.0", "maxmemory": 0, "maxmemory_policy": "allkeys-lru"}, "Redis 8.0.0"),
        ({"redis_version": "7.4.1", "maxmemory": 1, "maxmemory_policy": "noeviction"}, "Redis 7.4.1"),
    ],
)
def test_a_usable_server_is_named(info: dict[str, object], text: str) -> None:
    assert verify_server(claims(**info)) == text


@pytest.mark.parametrize(
    ("info", "fault"),
    [
        ({"redis_version": "6.2.14"}, "Redis 6.2.14, older than 7.0"),
        ({"redis_version": "7.2.4", "valkey_version": "7.1.0"}, "Valkey 7.1.0, older than 7.2"),
        ({"redis_version": "7.4.0", "maxmemory": 1, "maxmemory_policy": "volatile-lru"}, "noeviction"),
        ({}, "Redis 0, older"),
    ],
)
def test_a_server_that_loses_jobs_is_refused_with_the_fix(info: dict[str, object], fault: str) -> None:
    with pytest.raises(BrokerUnsupported, match=fault):
        verify_server(claims(**info))


def test_a_real_server_is_verified_without_config(data_dir: Path, binary: Path) -> None:
    with EmbeddedBroker(data_dir, binary=binary) as broker, client_of(broker.url) as admin:
        for user, rules in {"plain": ["+@all", "-config"], "blind": ["+ping"]}.items():
            admin.acl_setuser(user, enabled=True, nopass=True, keys="*", commands=rules)
        with client_of(broker.url, username="plain", password="any") as client:
            assert verify_server(client).split()[0] in ("Valkey", "Redis")
            admin.config_set("maxmemory-policy", "allkeys-lru")
            with pytest.raises(BrokerUnsupported, match="maxmemory-policy is allkeys-lru"):
                verify_server(client)
        with (
            client_of(broker.url, username="blind", password="any") as client,
            pytest.raises(BrokerUnsupported, match=r"\+info"),
        ):
            verify_server(client)


def test_a_server_that_is_not_there_is_unreachable(tmp_path: Path) -> None:
    with client_of(f"unix://{tmp_path}/none.sock") as client, pytest.raises(BrokerUnreachable):
        verify_server(client)


# Defaults -----------------------------------------------------------------------------------------------


def test_the_state_survives_its_file() -> None:
    state = BrokerState(url="unix:///x", pid=1, data_dir="/", server="Redis", version="7.0.0", started_at=1.5)
    assert BrokerState.from_json(state.to_json()) == state
    assert json.loads(state.to_json())["pid"] == 1


def test_the_default_memory_leaves_half_of_the_machine() -> None:
    physical_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < default_max_memory_bytes() <= min(physical_bytes // 2, 4 << 30)


def test_the_default_folder_is_the_user_s() -> None:
    assert default_data_dir().name == "broker"
    assert "latentq" in default_data_dir().parts
