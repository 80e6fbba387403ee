"""Generator processes that end when they should not: no prompt is lost, none takes its device along, no run hangs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from broker_config.settings import Settings
from producer import DecodeClient
from producer.prompt_farm import process_generator
from producer.prompt_farm.display import display_of
from producer.prompt_farm.events import Ended, Event, GivenUp, Restarted
from producer.prompt_farm.options import FarmOptions
from producer.prompt_farm.plan import plan
from producer.prompt_farm.process_generator import ProcessGenerator
from producer.prompt_farm.results import FarmResult
from producer.prompt_farm.rows import rows_of
from producer.prompt_farm.run import GeneratorPart, Run, settled
from tests.support.processes import ROOT, environment_of
from tests.support.sick_denoiser import LOST
from tests.support.wait import wait_until

#: A process is started a few times, beside other tests.
_BOUND_S = 120.0


@pytest.fixture
def scripted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], ProcessGenerator]]:
    """Makes generators whose processes do what prompts tell them to, loading already."""
    monkeypatch.setattr(process_generator, "_PROGRAM", ("-m", "tests.support.scripted_generator"))
    environment = {**environment_of(settings), "SCRIPTED_FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT)}
    made: list[ProcessGenerator] = []

    def make() -> ProcessGenerator:
        generator = ProcessGenerator(
            name="cpu",
            device="cpu",
            pipeline="scripted",
            revision=None,
            vae=None,
            dtype=None,
            compiled=False,
            environment=environment,
        )
        made.append(generator)
        generator.load()
        return generator

    yield make
    for generator in made:
        generator.kill()
    for generator in made:
        generator.join()


class Told:
    """A run in a thread, and what it tells."""

    def __init__(self, client: DecodeClient, prompts: Sequence[str], generators: Sequence[GeneratorPart]) -> None:
        options = FarmOptions()
        recipe = settled(options, pipeline="scripted", vae="demo", output="png")
        self.run = Run(
            plan(rows_of(prompts), recipe),
            client=client,
            recipe=recipe,
            options=options,
            generators=generators,
            destination=None,
            manifest=None,
        )
        self.events: list[Event] = []
        self.results: list[FarmResult] = []
        self.run.on_event = self.events.append
        self._thread = threading.Thread(target=lambda: self.results.extend(self.run.results()), daemon=True)

    def start(self) -> Told:
        self._thread.start()
        return self

    def finish(self) -> Told:
        """Waits until the run has ended by itself."""
        self._thread.join(_BOUND_S)
        assert not self._thread.is_alive(), self.events
        return self

    @property
    def made(self) -> list[str]:
        """Prompts that a generator has worked off."""
        return sorted(item.prompt for item in self.results if item.error is not None and item.error.code == "scripted")

    @property
    def failed(self) -> dict[str, str]:
        """The others: prompt → message."""
        errors = {item.prompt: item.error for item in self.results if item.error is not None}
        return {prompt: error.message for prompt, error in errors.items() if error.code != "scripted"}

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def starts(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "starts").read_text().splitlines()]


def test_a_prompt_that_kills_three_processes_does_not_take_the_device_along(
    client: DecodeClient, scripted: Any, tmp_path: Path
) -> None:
    told = Told(client, ["die", "a", "b", "c"], [scripted()]).start().finish()
    assert told.made == ["a", "b", "c"]
    assert told.failed == {"die": "3 generators died while this prompt was denoised"}
    assert len(told.of(Restarted)) == 3
    assert told.of(GivenUp) == []


def test_a_device_that_dies_of_every_prompt_is_given_up_and_leaves_the_others_alone(
    client: DecodeClient, scripted: Any, tmp_path: Path
) -> None:
    told = Told(client, ["die"] * 5, [scripted()]).start().finish()
    assert len(starts(tmp_path)) == 9
    (given_up,) = told.of(GivenUp)
    assert given_up.message == "9 deaths in a row, the last one: the generator on cpu ended with signal 9"
    messages = [result.error.message for result in told.results if result.error is not None]
    assert messages.count("3 generators died while this prompt was denoised") == 3
    left = f"every generator has ended before this prompt was denoised; cpu was given up: {given_up.message}"
    assert messages.count(left) == 2


def test_a_device_that_cannot_load_any_more_is_given_up_with_the_reason_and_costs_no_prompt(
    client: DecodeClient, scripted: Any, tmp_path: Path
) -> None:
    generator = scripted()
    generator.ready.result(_BOUND_S)
    (tmp_path / "refuse").touch()
    told = Told(client, ["die once", "a"], [generator]).start().finish()
    (given_up,) = told.of(GivenUp)
    why = "the generator on cpu ended with status 2: the device has fallen off the bus"
    assert given_up.message == f"3 deaths in a row, the last one: {why}"
    assert told.run.backlog.deaths.total() == 1
    assert set(told.failed) == {"die once", "a"}
    assert why in told.failed["a"]


def test_a_device_that_is_given_up_is_told_of(client: DecodeClient) -> None:
    told = Told(client, ["a"], [])
    shown = StringIO()
    console = Console(file=shown, width=200)
    display_of(console, told.run.tally, depth=lambda: 0).event(GivenUp(device="cuda:3", message="3 deaths in a row"))
    assert "cuda:3 is given up: 3 deaths in a row" in shown.getvalue()


def test_a_process_that_is_told_to_end_alone_is_started_again_and_its_prompts_are_made(
    client: DecodeClient, scripted: Any, tmp_path: Path
) -> None:
    told = Told(client, ["hold", "a", "b", "c"], [scripted()]).start()
    wait_until(lambda: (tmp_path / "holding").exists(), timeout_s=_BOUND_S)
    # The second one waits in the pipe.
    wait_until(lambda: len(told.run.backlog._held.get("cpu", {})) == 2, timeout_s=_BOUND_S)
    os.kill(starts(tmp_path)[0], signal.SIGTERM)
    told.finish()
    assert told.made == ["a", "b", "c", "hold"]
    (restarted,) = told.of(Restarted)
    assert restarted.message == "the generator on cpu ended with work left"
    assert told.run.backlog.deaths.total() == 0


def test_a_process_that_has_lost_its_device_is_started_again_and_the_prompt_with_it(
    client: DecodeClient, scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_generator, "_PROGRAM", ("-m", "tests.support.sick_denoiser"))
    told = Told(client, ["bad 1", "lose", "bad 2"], [scripted()]).start().finish()
    (restarted,) = told.of(Restarted)
    lost = f"the device is lost since RuntimeError: {LOST}"
    assert restarted.message == f"the generator on cpu ended with status 70: {lost}"
    words = "ScriptedPipeline raised ValueError: no"
    assert told.failed == {prompt: f"{words} {prompt}" for prompt in ("bad 1", "lose", "bad 2")}


def test_what_a_generator_held_when_the_last_one_ended_fails(client: DecodeClient) -> None:
    told = Told(client, ["a", "b"], [Leaver()]).start().finish()
    assert told.failed == dict.fromkeys("ab", "every generator has ended before this prompt was denoised")


class Leaver:
    """Takes a prompt, and ends."""

    device = "cpu"

    def start(self, run: Run) -> None:
        next(iter(run.backlog.batches(self.device)))
        run.emit(Ended(device=self.device))

    def stop(self) -> None:
        """Nothing: it has ended."""

    def join(self) -> None:
        """Nothing: it has ended."""


# Before the run has begun --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_process_that_ends_while_others_load_is_started_again_when_the_run_begins(
    client: DecodeClient, scripted: Any, tmp_path: Path, number: signal.Signals
) -> None:
    generator = scripted()
    generator.ready.result(_BOUND_S)
    os.kill(starts(tmp_path)[0], number)
    if number == signal.SIGKILL:
        wait_until(lambda: generator._process.returncode is not None, timeout_s=_BOUND_S)
    told = Told(client, ["a", "b", "c"], [generator]).start().finish()
    assert told.made == ["a", "b", "c"]
    assert len(told.of(Restarted)) == 1


def test_a_generator_that_was_killed_before_the_run_begins_does_not_hold_it_up(
    client: DecodeClient, scripted: Any
) -> None:
    generator = scripted()
    generator.ready.result(_BOUND_S)
    generator.kill()
    generator.join()
    told = Told(client, ["a"], [generator]).start().finish()
    assert set(told.failed) == {"a"}
    assert len(told.of(Ended)) == 1


@pytest.mark.parametrize("moment", ["_adopt", "fill"])
def test_a_run_that_is_stopped_before_its_generators_begin_ends(
    client: DecodeClient, scripted: Any, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = scripted()
    generator.ready.result(_BOUND_S)
    told = Told(client, ["a"], [generator])
    owner: Any = told.run if moment == "_adopt" else told.run.backlog
    usual = getattr(owner, moment)

    def stopped(*arguments: Any) -> Any:
        told.run.stop()
        generator.join()
        return usual(*arguments)

    monkeypatch.setattr(owner, moment, stopped)
    told.start().finish()
    assert told.results == []
