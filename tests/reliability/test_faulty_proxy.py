"""The proxy of the tests loses what it is told to lose, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.faulty_proxy import FaultyProxy
from tests.support.wait import wait_until

Opener = Callable[..., Any]


@pytest.fixture
def proxy(broker_url: str) -> Iterator[FaultyProxy]:
    """A proxy in front of an empty broker."""
    with FaultyProxy(broker_url) as between:
        yield between


@pytest.fixture
def broker(broker_url: str) -> Iterator[Any]:
    """The broker, past the proxy; what a test stored is removed."""
    with redis.Redis.from_url(broker_url) as direct:
        yield direct
        direct.flushall()


@pytest.fixture
def connect(proxy: FaultyProxy) -> Iterator[Opener]:
    """Opens clients of the proxy that repeat nothing by themselves."""
    opened: list[redis.Redis] = []

    def make(**options: Any) -> redis.Redis:
        options = {"retry": Retry(NoBackoff(), 0), "socket_timeout": 20} | options
        client = redis.Redis.from_url(proxy.url, **options)
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.close()


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("size", [0, 1, 1 << 16, 16 << 20])
def test_bytes_of_any_kind_and_size_pass_unchanged(connect: Opener, broker: Any, size: int, protocol: int) -> None:
    client = connect(protocol=protocol)
    data = (b"\r\n*3\r\n$-1\r\n+OK\r\n\x00\xff" * (size // 18 + 1))[:size]
    assert client.set("key", data)
    assert client.get("key") == data == broker.get("key")


@pytest.mark.parametrize("protocol", [2, 3])
def test_every_kind_of_reply_passes(connect: Opener, broker: Any, protocol: int) -> None:
    client = connect(protocol=protocol)
    client.hset("hash", mapping={"a": "1", "b": "2"})
    client.zadd("zset", {"a": 1.5, "b": float("inf")})
    client.sadd("set", "a")
    client.xadd("stream", {"a": "1"}, id="1-1")
    assert client.hgetall("hash") == {b"a": b"1", b"b": b"2"}
    assert client.zscore("zset", "b") == float("inf")
    assert client.smembers("set") == {b"a"}
    assert client.get("nothing") is None
    assert client.blpop(["nothing"], timeout=0.01) is None
    assert client.eval("return {1, {'two', false}, {}}", 0) == [1, [b"two", None], []]
    assert client.config_get("maxmemory").keys() == {"maxmemory"}
    with pytest.raises(redis.ResponseError, match="unknown command"):
        client.execute_command("NONSENSE")
    assert client.ping()


def test_commands_are_listed_in_order_and_forgotten_on_reset(proxy: FaultyProxy, connect: Opener, broker: Any) -> None:
    client = connect()
    client.ping()
    proxy.reset()
    with client.pipeline(transaction=True) as pipe:
        pipe.set("a", b"*1\r\n$4\r\nPING\r\n")
        pipe.get("a")
        assert pipe.execute() == [True, b"*1\r\n$4\r\nPING\r\n"]
    assert proxy.commands == ["MULTI", "SET", "GET", "EXEC"]
    proxy.reset()
    assert proxy.commands == []


def test_a_swallowed_reply_is_that_of_a_command_the_broker_executed(
    proxy: FaultyProxy, connect: Opener, broker: Any
) -> None:
    client = connect()
    rule = proxy.swallow_reply(command="INCRBY", nth=2)
    assert client.incr("count") == 1
    assert not rule.struck
    with pytest.raises(redis.ConnectionError):
        client.incr("count")
    assert rule.struck
    assert broker.get("count") == b"2"
    assert client.incr("count") == 3


def test_a_command_that_is_cut_before_never_reaches_the_broker(
    proxy: FaultyProxy, connect: Opener, broker: Any
) -> None:
    client = connect()
    proxy.cut_before(command="INCRBY", nth=2)
    assert client.incr("count") == 1
    with pytest.raises(redis.ConnectionError):
        client.incr("count")
    assert broker.get("count") == b"1"
    assert client.incr("count") == 2


@pytest.mark.parametrize(("fault", "executed"), [("swallow_reply", 3), ("cut_before", 2)])
def test_in_a_pipeline_what_comes_before_is_executed_and_what_comes_after_is_not(
    proxy: FaultyProxy, connect: Opener, broker: Any, fault: str, executed: int
) -> None:
    client = connect()
    client.ping()
    getattr(proxy, fault)(nth=3)
    with client.pipeline(transaction=False) as pipe:
        for number in range(5):
            pipe.rpush("list", number)
        with pytest.raises(redis.ConnectionError):
            pipe.execute()
    assert broker.llen("list") == executed


def test_a_rule_can_name_an_argument(proxy: FaultyProxy, connect: Opener, broker: Any) -> None:
    client = connect()
    proxy.cut_before(argument=b"this")
    client.set("other", "value")
    with pytest.raises(redis.ConnectionError):
        client.set("this", "value")
    assert broker.keys() == [b"other"]


def test_the_drivers_own_repeats_do_what_they_are_known_for(proxy: FaultyProxy, connect: Opener, broker: Any) -> None:
    client = connect(retry=Retry(NoBackoff(), 3))
    proxy.swallow_reply(command="RPUSH")
    assert client.rpush("list", "item") == 2
    assert broker.lrange("list", 0, -1) == [b"item", b"item"]


def _in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except redis.RedisError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="caller")
    thread.start()
    return thread, outcome


def test_a_held_command_reaches_the_broker_when_released(proxy: FaultyProxy, connect: Opener, broker: Any) -> None:
    client = connect()
    rule = proxy.hold(command="SET")
    thread, outcome = _in_thread(lambda: client.set("key", "value"))
    rule.wait()
    assert not broker.exists("key")
    assert connect().ping(), "other connections go on"
    rule.release()
    thread.join()
    assert outcome == [True]
    assert broker.get("key") == b"value"


def test_a_held_command_whose_connection_is_cut_never_reaches_the_broker(
    proxy: FaultyProxy, connect: Opener, broker: Any
) -> None:
    client = connect()
    rule = proxy.hold(command="SET")
    thread, outcome = _in_thread(lambda: client.set("key", "value"))
    rule.wait()
    proxy.cut_all()
    thread.join()
    assert isinstance(outcome[0], redis.ConnectionError)
    wait_until(lambda: proxy.connections == 0, what="the connection to go")
    rule.release()
    assert client.ping()
    assert not broker.exists("key")


def test_a_held_reply_is_that_of_a_command_the_broker_executed(
    proxy: FaultyProxy, connect: Opener, broker: Any
) -> None:
    client = connect()
    rule = proxy.hold_reply(command="SET")
    thread, outcome = _in_thread(lambda: client.set("key", "value"))
    rule.wait()
    assert broker.get("key") == b"value"
    assert outcome == []
    rule.release()
    thread.join()
    assert outcome == [True]


def test_a_delayed_command_comes_late(proxy: FaultyProxy, connect: Opener, broker: Any) -> None:
    client = connect()
    client.ping()
    proxy.delay(0.2, times=1, command="PING")
    began = time.monotonic()
    client.ping()
    assert time.monotonic() - began >= 0.2
    began = time.monotonic()
    client.ping()
    assert time.monotonic() - began < 0.2


def test_refused_connections_look_like_a_broker_that_is_down(proxy: FaultyProxy, connect: Opener, broker: Any) -> None:
    client = connect()
    client.ping()
    with proxy.refused():
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                client.ping()
    assert client.ping()
    proxy.refuse_for(0.1)
    with pytest.raises(redis.ConnectionError):
        client.ping()

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    wait_until(answers, what="the proxy to listen again")


def test_a_frozen_network_closes_nothing_and_goes_on(proxy: FaultyProxy, connect: Opener, broker: Any) -> None:
    client, hasty = connect(), connect(socket_timeout=0.1)
    client.ping()
    hasty.ping()
    with proxy.frozen():
        thread, outcome = _in_thread(client.ping)
        with pytest.raises(redis.TimeoutError):
            hasty.ping()
        assert outcome == []
    thread.join()
    assert outcome == [True]


def test_published_messages_pass_and_a_subscription_can_be_cut(
    proxy: FaultyProxy, connect: Opener, broker: Any
) -> None:
    pubsub = connect().pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe("channel")
    wait_until(lambda: broker.pubsub_numsub("channel")[0][1] == 1, what="the subscription")
    broker.publish("channel", b"\r\n")
    message = wait_until(lambda: pubsub.get_message(timeout=1))
    assert message["data"] == b"\r\n"
    proxy.cut_all()
    wait_until(lambda: broker.pubsub_numsub("channel")[0][1] == 0, what="the subscription to go")
    pubsub.close()


def test_many_connections_at_once(proxy: FaultyProxy, connect: Opener, broker: Any) -> None:
    def work(number: int) -> None:
        client = connect()
        for turn in range(50):
            client.set(f"{number}", turn)
            assert client.get(f"{number}") == str(turn).encode()
            client.incr("count")

    threads = [threading.Thread(target=work, args=(number,), name="caller") for number in range(20)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: proxy.connections == 20)
    for thread in threads:
        thread.join()
    assert broker.get("count") == b"1000"
    assert proxy.commands.count("INCRBY") == 1000


def test_a_broker_that_is_down_is_down_through_the_proxy_too() -> None:
    with FaultyProxy("redis://127.0.0.1:1") as proxy:
        client = redis.Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 0))
        with pytest.raises(redis.ConnectionError):
            client.ping()
        client.close()


def test_the_url_keeps_login_and_database() -> None:
    with FaultyProxy("redis://us%40er:pass%2Fword@127.0.0.1:1/3") as proxy:
        assert proxy.url.startswith("redis://us%40er:pass%2Fword@127.0.0.1:")
        assert proxy.url.endswith("/3")
