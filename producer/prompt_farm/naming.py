"""Names of files: a template over the facts of a task, checked for all tasks before the first one runs.

Only `{id}` is sure to differ from task to task: a template that gives two of them one name is refused.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
from typing import Any, Final

from broker_config.errors import InvalidOption
from producer.prompt_farm.plan import Task

#: What rows that stay keep, however the file around them is edited.
DEFAULT_TEMPLATE: Final = "{slug}-{id}"
#: Enough that a hundred thousand names differ (a hash of 48 bits).
_ID_DIGITS: Final = 12
_SLUG_CHARS: Final = 60
#: File systems hold 255 bytes; an extension and a temporary's suffix follow.
_LONGEST_BYTES: Final = 200
NAME_FIELDS: Final = ("id", "slug", "seed", "line", "image", "occurrence", "height", "width", "steps", "guidance")


class NameTemplate:
    """A name without extension for each task; `/` makes folders."""

    def __init__(self, template: str = DEFAULT_TEMPLATE) -> None:
        """Raises:
        InvalidOption: not a template, a field there is not, or a path that leaves the folder.
        """
        self.template = template
        try:
            named = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise self._refuse(f"cannot be read: {error}") from None
        for name in named:
            if name not in NAME_FIELDS:
                raise self._refuse(f"has {{{name}}}; there are {', '.join('{' + item + '}' for item in NAME_FIELDS)}")

    def name(self, task: Task) -> str:
        """The name of a task's file.

        Raises:
            InvalidOption: the template makes no name of it.
        """
        row = task.row
        values: dict[str, Any] = {name: getattr(row, name, None) for name in NAME_FIELDS}
        values = {name: "default" if value is None else value for name, value in values.items()}
        values |= {
            "id": task.job_id.rpartition("-")[2][:_ID_DIGITS],
            "slug": slug(row.prompt),
            "seed": task.seed,
            "image": task.image,
            "occurrence": task.occurrence,
        }
        try:
            name = self.template.format(**values)
        except (ValueError, TypeError, IndexError) as error:
            raise self._refuse(f"cannot be filled in for line {row.line}: {error}") from None
        parts = name.split("/")
        if not all(_is_part(part) for part in parts):
            raise self._refuse(f"makes {name[:80]!r} of line {row.line}, which is not the name of a file")
        return name

    def names(self, tasks: Iterable[Task]) -> dict[str, str]:
        """Job id → name, for every task.

        Raises:
            InvalidOption: two tasks have one name.
        """
        taken: dict[str, Task] = {}
        names = {}
        for task in tasks:
            name = names[task.job_id] = self.name(task)
            # Some file systems take upper and lower case for the same.
            other = taken.setdefault(name.casefold(), task)
            if other is not task:
                raise self._refuse(
                    f"makes the same name {name!r} of line {other.row.line} and line {task.row.line}: add {{id}}"
                )
        return names

    def _refuse(self, reason: str) -> InvalidOption:
        return InvalidOption(f"name template {self.template!r} {reason}", field="name_template")


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of ASCII, words joined by hyphens."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()
    words = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    if len(words) > _SLUG_CHARS:
        words = words[:_SLUG_CHARS].rpartition("-")[0] or words[:_SLUG_CHARS]
    return words or "prompt"


def _is_part(part: str) -> bool:
    return (
        0 < len(part.encode()) <= _LONGEST_BYTES
        and part == part.strip()
        and not part.startswith(".")
        and not any(letter in part for letter in '\0\\:*?"<>|')
        and part.isprintable()
    )
