"""The plan of a run: rows and settings become tasks, each with an id that is the same in every run.

The id is a hash of what the row asks for, of the settings that decide the picture, of which picture of the row it is
and of which occurrence of the row: so an edited prompts file keeps the ids of the rows that stayed, wherever they stand
now, and equal rows are distinct. Where results go, how they are named, on which device and in which batches they are
denoised is no part of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from producer.prompt_farm.rows import PromptRow

_ID_DIGITS: Final = 40
#: Seeds that are made here; small enough for every other tool's seed field.
_SEED_BITS: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One picture or clip that a run makes."""

    row: PromptRow
    #: Which of the row's pictures, from 0.
    image: int
    #: Which of the equal rows, from 0.
    occurrence: int
    #: Of the noise it starts from.
    seed: int
    #: Hash of all that: what the task is called, whatever its jobs are.
    job_id: str
    #: Jobs of this task that came to nothing in earlier runs (`adoption.py`).
    attempt: int = 0

    @property
    def submit_id(self) -> str:
        """Id of its job."""
        return self.job_id if self.attempt == 0 else f"{self.job_id}-r{self.attempt}"

    @property
    def call(self) -> tuple[object, ...]:
        """Tasks with the same one can be denoised in one call."""
        row = self.row
        return (row.height, row.width, row.steps, row.guidance, row.num_frames, row.negative_prompt is None)

    def to_wire(self) -> dict[str, Any]:
        """As JSON takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Task:
        """What `to_wire` made."""
        return cls(**{**wire, "row": PromptRow(**wire["row"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Settings of a run that decide the pictures, next to the rows."""

    #: Says which weights denoise.
    pipeline: str
    #: Catalogue entry that decodes.
    vae: str
    output: str
    mode: str | None = None
    images_per_prompt: int = 1
    #: Seeds of rows without one are made of it.
    seed: int = 0
    #: For rows that say nothing themselves: fields of a row.
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What the manifest says of each picture beside its row."""
        return {"pipeline": self.pipeline, "vae": self.vae, "output": self.output, "mode": self.mode}


def plan(rows: Iterable[PromptRow], recipe: Recipe) -> list[Task]:
    """Every task of a run, in the order of the rows."""
    tasks = []
    seen: Counter[str] = Counter()
    settings = recipe.settings()
    for row in rows:
        whole = row.with_defaults(recipe.defaults)
        asked = whole.asked()
        key = _canonical(asked)
        occurrence = seen[key]
        seen[key] += 1
        for image in range(recipe.images_per_prompt):
            identity = {"row": asked, "settings": settings, "image": image, "occurrence": occurrence}
            if whole.seed is None:
                identity["seed"] = recipe.seed
            digest = hashlib.sha256(_canonical(identity).encode()).hexdigest()
            own = int(digest[-_SEED_BITS // 4 :], 16)
            seed = own if whole.seed is None else whole.seed + image
            job_id = f"farm-{digest[:_ID_DIGITS]}"
            tasks.append(Task(row=whole, image=image, occurrence=occurrence, seed=seed, job_id=job_id))
    return tasks


def batches(tasks: Sequence[Task], *, size: int) -> Iterator[list[Task]]:
    """Tasks that one call can denoise, `size` at most, in the order in which their first one stands."""
    groups: dict[tuple[object, ...], list[Task]] = {}
    full: list[tuple[int, list[Task]]] = []
    first: dict[tuple[object, ...], int] = {}
    for number, task in enumerate(tasks):
        group = groups.setdefault(task.call, [])
        if not group:
            first[task.call] = number
        group.append(task)
        if len(group) == size:
            full.append((first[task.call], groups.pop(task.call)))
    full += [(first[call], group) for call, group in groups.items()]
    for _, group in sorted(full, key=lambda item: item[0]):
        yield group


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
