"""The state machine of a job, in Lua: one file for each transition, `prelude.lua` and `outbox.lua` shared by all.

Every script is atomic, safe to send again, and flagged `allow-oom`: a full broker must not keep leases from being
renewed or results from being stored; `submit` looks at the memory itself, so that its refusal says why. They build key
names from ids, so the broker must not be a cluster that shards (docs/decisions/0002-state-in-lua.md).
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from broker_config import keys


@cache
def source(name: str) -> str:
    """Text of a script as it is sent to the broker."""
    folder = resources.files(__package__)
    prelude = "".join((folder / f"{shared}.lua").read_text() for shared in ("prelude", "outbox"))
    prelude = prelude.replace("{{prefix}}", keys.PREFIX).replace("{{rq}}", keys.RQ_PREFIX)
    return f"#!lua flags=allow-oom\n{prelude}\n{(folder / f'{name}.lua').read_text()}"
