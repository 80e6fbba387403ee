"""Tables fit the terminal they are printed on, ids stay whole, and a pipe gets one line for each item."""

from __future__ import annotations

import pytest

from tests.operations.conftest import Made, Run

UUID = "01a206f8-3a06-706d-985c-8ffcba93a98b-r1"
LONGEST = "i" * 64


@pytest.fixture(autouse=True)
def _jobs(made: Made) -> None:
    """Jobs and workers with the longest names there are."""
    made.failed(UUID, code="start_deadline_passed")
    made.processing("running")
    made.queued("waits")
    made.serving("render-node-2.internal.example.com-2718-ffeedd", "sdxl", "flux", "hunyuanvideo", "sd")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["queues", "workers", "jobs", "doctor"])
def test_no_line_is_longer_than_the_terminal_is_wide(cli: Run, command: str, columns: int) -> None:
    lines = cli(command, columns=columns).stdout.splitlines()
    assert len(lines) >= 2
    assert max(len(line) for line in lines) <= columns
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("columns", [80, 120, None])
def test_an_id_is_never_folded(cli: Run, made: Made, columns: int | None) -> None:
    made.queued(LONGEST, "sd")
    text = cli("jobs", columns=columns).stdout
    assert LONGEST in text
    assert UUID in text


def test_an_error_stands_under_its_job_where_there_is_no_room_beside_it(cli: Run) -> None:
    lines = cli("jobs", columns=80).stdout.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(UUID)]
    assert lines[at].split()[1:3] == ["failed", "sdxl"]
    assert lines[at + 1] == "  start_deadline_passed"


def test_into_a_pipe_each_item_is_one_line(cli: Run) -> None:
    lines = cli("jobs", columns=None).stdout.splitlines()
    assert len(lines) == 1 + 3
    assert lines[-1].split()[0] == UUID
    assert lines[-1].endswith("start_deadline_passed")
    assert len(cli("workers", columns=None).stdout.splitlines()) == 2
    doctor = cli("doctor", columns=None).stdout.splitlines()
    assert [line for line in doctor if line.startswith("problem  janitor")] == [
        "problem  janitor        none leads: jobs of workers that die do not come back, and retention does not end"
    ]
