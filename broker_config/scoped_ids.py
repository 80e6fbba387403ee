"""Ids of jobs that came in with a gateway's key: `k_<key id>_<name>`, the key in front of the client's own name.

Two keys can use one name, and neither can tell that the other did.
"""

from __future__ import annotations

import re

_SCOPED = re.compile(r"k_([a-z2-7]{8})_(.+)")


def scoped(key_id: str, name: str) -> str:
    """The broker's id of the job that this key calls `name`."""
    return f"k_{key_id}_{name}"


def key_of(job_id: str) -> str | None:
    """Id of the key that a job came in with; None: with none."""
    match = _SCOPED.fullmatch(job_id)
    return match[1] if match else None


def name_of(job_id: str) -> str:
    """What the job's own client calls it."""
    match = _SCOPED.fullmatch(job_id)
    return match[2] if match else job_id


def shown_to(key_id: str | None, job_id: str) -> str:
    """What a key calls a job by its broker's id; None: someone without a key, to whom ids are what they are."""
    return name_of(job_id) if key_id is not None and key_of(job_id) == key_id else job_id
