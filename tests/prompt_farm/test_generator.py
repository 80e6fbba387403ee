"""A generator whose device is lost, or whose pipeline fails with whatever it is given: it ends, and fails no prompt."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from producer import DecodeClient
from producer.prompt_farm.events import Event, Failed, Submitted
from producer.prompt_farm.generator import DeviceLost, Generator
from producer.prompt_farm.plan import Recipe, batches, plan
from producer.prompt_farm.rows import rows_of
from tests.support.sick_denoiser import LOST, SickDenoiser


class Work:
    """What a generator makes of prompts, one in a batch."""

    def __init__(self, client: DecodeClient, *prompts: str, patience: int | None = 3, size: int = 1) -> None:
        self.denoiser = SickDenoiser()
        self.events: list[Event] = []
        self._tasks = plan(rows_of(prompts), Recipe(pipeline="p", vae="demo", output="png"))
        self._size = size
        sick: Any = self.denoiser
        self._generator = Generator(
            sick,
            client,
            device="cuda:0",
            options={},
            emit=self.events.append,
            stopping=threading.Event(),
            patience=patience,
        )

    def run(self) -> Work:
        self._generator.run(batches(self._tasks, size=self._size))
        return self

    def of(self, kind: type[Submitted] | type[Failed]) -> list[str]:
        prompts = {task.job_id: task.row.prompt for task in self._tasks}
        return [prompts[event.task] for event in self.events if isinstance(event, kind)]


@pytest.mark.parametrize("size", [1, 2])
def test_a_lost_device_ends_the_generator_and_fails_no_prompt(client: DecodeClient, size: int) -> None:
    work = Work(client, "a", "b", "lose", "c", "d", "e", size=size)
    with pytest.raises(DeviceLost, match=LOST):
        work.run()
    assert work.of(Submitted) == ["a", "b"]
    assert work.of(Failed) == []
    assert work.denoiser.asked == ["a", "b", "lose"]


def test_a_device_that_is_lost_as_latents_come_off_it_fails_no_prompt(
    client: DecodeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(client, "a", "b")

    def lose(*_: object, **__: object) -> None:
        work.denoiser.is_lost = True
        raise RuntimeError(LOST)

    monkeypatch.setattr(client, "submit", lose)
    with pytest.raises(DeviceLost, match=LOST):
        work.run()
    assert work.of(Failed) == []


def test_a_pipeline_that_worked_and_fails_with_three_prompts_in_a_row_is_lost(client: DecodeClient) -> None:
    work = Work(client, "a", "bad 1", "bad 1", "bad 2", "b", "bad 3", "bad 4", "bad 5", "c")
    with pytest.raises(DeviceLost, match="3 prompts in a row failed: ScriptedPipeline raised ValueError: no bad 5"):
        work.run()
    assert work.of(Failed) == ["bad 1", "bad 1", "bad 2", "bad 3", "bad 4"]
    assert work.of(Submitted) == ["a", "b"]


@pytest.mark.parametrize(("first", "patience"), [("bad 0", 3), ("a", None)])
def test_prompts_fail_one_by_one_where_a_new_process_would_not_help(
    client: DecodeClient, first: str, patience: int | None
) -> None:
    bad = [f"bad {number}" for number in range(1, 6)]
    work = Work(client, first, *bad, patience=patience).run()
    assert work.of(Failed)[-5:] == bad
