"""The allow-list: which function names a job may carry, and the kind of work each stands for.

RQ's own worker would import and call what a job names. Ours looks the name up here and calls nothing, so
whoever can write to the broker cannot run code. The function itself exists only to tell someone who points a
stock `rq worker` at our queues what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NoReturn

from broker_config.errors import UnsupportedMessage
from broker_config.messages import DECODE_FUNCTION, ENCODE_FUNCTION
from broker_config.rq_format import called_function

#: Function name in the job → kind of work.
HANDLERS: Final[Mapping[str, str]] = {DECODE_FUNCTION: "decode", ENCODE_FUNCTION: "encode"}


def kind_of(rq_data: bytes) -> str:
    """The kind of work a job's RQ data asks for.

    Raises:
        UnsupportedMessage: a function that is not on the list.
    """
    name = called_function(rq_data)
    if name not in HANDLERS:
        raise UnsupportedMessage(f"the job asks for {name!r}, which is not one of {', '.join(HANDLERS)}")
    return HANDLERS[name]


def decode(job_id: str) -> NoReturn:
    """What a stock `rq worker` would call."""
    raise UnsupportedMessage(f"job {job_id} needs `latentq worker`; a stock `rq worker` cannot decode latents")


def encode(job_id: str) -> NoReturn:
    """What a stock `rq worker` would call."""
    raise UnsupportedMessage(f"job {job_id} needs `latentq worker`; a stock `rq worker` cannot encode pictures")
