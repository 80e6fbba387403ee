"""What the table of routes says of one route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from pydantic import BaseModel

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
#: A JSON schema.
Schema = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    handler: Handler
    #: One line for the document.
    summary: str
    #: Answers without asking who asks.
    open: bool = False
    #: Answers whoever has a signed link to it, instead of a key.
    linked: bool = False
    #: Status → model of a JSON body, a content type, or None for no body.
    answers: Mapping[int, type[BaseModel] | str | None] = field(default_factory=dict)
    #: Query parameters by name; `"options"` as a name stands for the options of a job.
    query: Mapping[str, Schema] = field(default_factory=dict)
    #: Whether the options of a job may stand in the query; `again`: those that do not belong to the latents; `remote`,
    #: `encode`: those that the protocol leaves open.
    options: str = ""
    headers: Mapping[str, Schema] = field(default_factory=dict)
    #: `submit`, `batch`, `redecode`, `remote`, `picture`, `ping`, `secret` or `token`; see openapi.py.
    body: str = ""
    #: Statuses of problems besides those that any request can meet.
    problems: tuple[int, ...] = ()
    #: Left out of the document: pages and files.
    hidden: bool = False
