"""docs/prompt-farm.md has every option, every field of a row, and every field of a name template."""

from __future__ import annotations

import dataclasses
import re

import click
import typer

from producer.cli import app
from producer.prompt_farm.naming import DEFAULT_TEMPLATE, NAME_FIELDS
from producer.prompt_farm.options import FarmOptions
from producer.prompt_farm.rows import ROW_FIELDS
from tests.support.processes import ROOT

PAGE = (ROOT / "docs" / "prompt-farm.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Rows of the table whose first column is headed so."""
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_every_option_of_the_command_is_documented_with_its_default() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    options = {item.opts[0]: item for item in group.commands["generate"].params}
    documented = {name: row[1] for row in rows("option") for name in re.findall(r"`(--[a-z-]+)`", row[0])}
    assert set(documented) == set(options)
    for name, item in options.items():
        if item.required:
            assert documented[name] == "required"
        elif isinstance(item.default, int) and not isinstance(item.default, bool):
            assert documented[name] == str(item.default)
    assert documented["--name-template"] == f"`{DEFAULT_TEMPLATE}`"


def test_every_field_of_a_row_is_documented() -> None:
    documented = {name for row in rows("field") for name in re.findall(r"`([a-z_]+)`", row[0])}
    assert documented == set(ROW_FIELDS)


def test_every_field_of_a_template_and_every_option_in_code_is_documented() -> None:
    assert set(NAME_FIELDS) <= set(re.findall(r"\{([a-z]+)\}", PAGE))
    in_code = PAGE.partition("## In code")[2]
    assert [item.name for item in dataclasses.fields(FarmOptions) if f"`{item.name}`" not in in_code] == []
