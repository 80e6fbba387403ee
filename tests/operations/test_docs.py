"""Every command, and every check of the doctor, is in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from broker_config.settings import Settings
from producer.cli import app
from producer.doctor import diagnose

DOCS = Path(__file__).parents[2] / "docs"
OPERATING = DOCS / "operating.md"


def commands() -> list[str]:
    group = typer.main.get_command(app)
    names = getattr(group, "commands", {})
    assert names
    return sorted(names)


@pytest.mark.parametrize("command", commands())
def test_every_command_is_documented(command: str) -> None:
    pages = [OPERATING, *DOCS.glob("cli*.md"), *DOCS.glob("cli/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert re.search(rf"latentq {re.escape(command)}\b", text), f"describe `latentq {command}` in docs/operating.md"


def test_every_check_of_the_doctor_is_documented_with_what_to_do(settings: Settings) -> None:
    rows = re.findall(r"^\| ([^|`]+) \| ([^|]+) \| ([^|]+) \|$", OPERATING.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {check.strip(): (meaning, remedy) for check, meaning, remedy in rows}
    for finding in diagnose(settings).findings:
        assert finding.check in documented
        assert all(cell.strip() for cell in documented[finding.check])
