"""What the broker holds, key by key: to say that something changed nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

#: Every key with its value and the time at which it expires (ms, -1: never).
Contents = dict[str, tuple[Any, int]]


def everything(admin: Any, *, but: Collection[str] = ()) -> Contents:
    """All keys but those named."""
    read: dict[bytes, Callable[[bytes], Any]] = {
        b"string": admin.get,
        b"hash": admin.hgetall,
        b"list": lambda key: admin.lrange(key, 0, -1),
        b"set": admin.smembers,
        b"zset": lambda key: admin.zrange(key, 0, -1, withscores=True),
        b"stream": admin.xrange,
    }
    return {
        key.decode(): (read[admin.type(key)](key), admin.pexpiretime(key))
        for key in admin.scan_iter(count=1000)
        if key.decode() not in but
    }


def assert_same(before: Contents, after: Contents) -> None:
    """Nothing changed: no key more or less, every value and every expiry as it was (to 5 ms, which PEXPIRE rounds)."""
    assert after.keys() == before.keys()
    for key, (value, expires_ms) in before.items():
        assert after[key][0] == value, key
        assert abs(after[key][1] - expires_ms) <= 5, key
