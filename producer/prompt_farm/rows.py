"""Prompt rows: what a line of a prompts file asks for, read from text, JSONL or CSV, and checked before anything runs.

Text has one prompt a line; empty lines and lines that begin with `#` are left out. JSONL has one object a line, or a
string. CSV has a header that names the fields. A row says nothing of the pipeline or of the decode: those are the same
for all rows of a run.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker_config.errors import ConfigurationError, InvalidRow

#: torch takes seeds of 64 bits, and Python's JSON readers agree on 63.
_LARGEST_SEED: Final = 2**63 - 1
_LONGEST_SIDE_PX: Final = 65_536
_MOST_STEPS: Final = 10_000
_JSONL_SUFFIXES: Final = (".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """One row. What is None is the run's default, then the pipeline's own."""

    prompt: str
    negative_prompt: str | None = None
    #: None: made of the row itself, so that it is the same in every run.
    seed: int | None = None
    #: Pixels.
    height: int | None = None
    width: int | None = None
    #: Denoising steps.
    steps: int | None = None
    #: Guidance scale.
    guidance: float | None = None
    #: Of pipelines that make clips.
    num_frames: int | None = None
    #: Where it stands in the file, from 1; no part of what the row asks for.
    line: int = 0

    def asked(self) -> dict[str, Any]:
        """The fields that are set, but for `line`."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value is not None and name != "line"}

    def with_defaults(self, defaults: Mapping[str, Any]) -> PromptRow:
        """The row with a run's defaults where it says nothing itself."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)


#: Fields a file may have.
ROW_FIELDS: Final = tuple(item.name for item in dataclasses.fields(PromptRow) if item.name != "line")


def read_rows(source: str) -> list[PromptRow]:
    """Rows of a file, or of standard input for `-`.

    Raises:
        ConfigurationError: the file cannot be read.
        InvalidRow: a row is malformed, or there is none; the message has its line and the field.
    """
    if source == "-":
        return parse_rows(sys.stdin.buffer.read(), name="standard input")
    path = Path(source).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"the prompts {path} cannot be read: {error.strerror}", field="prompts") from None
    return parse_rows(data, name=str(path), suffix=path.suffix.lower())


def parse_rows(data: bytes, *, name: str, suffix: str = "") -> list[PromptRow]:
    """Rows in the bytes of a file.

    Args:
        data: UTF-8, with or without a byte order mark.
        name: what messages call it.
        suffix: `.jsonl`, `.ndjson` and `.csv` say the form; another one means text, none: the first line tells.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidRow(f"{name}, line {line}: not UTF-8: save the file as UTF-8", field="prompt", line=line) from None
    parse = _parser(text, suffix)
    rows: list[PromptRow] = []
    for line, fields in parse(text, name):
        rows.append(checked_row(fields, name=name, line=line))
    if not rows:
        raise InvalidRow(f"{name} has no prompts", field="prompt")
    return rows


def rows_of(prompts: Iterable[str | PromptRow | Mapping[str, Any]]) -> list[PromptRow]:
    """Rows from Python: prompts, mappings with the fields of a row, or rows; the n-th counts as line n."""
    rows = []
    for line, item in enumerate(prompts, 1):
        fields = item.asked() if isinstance(item, PromptRow) else {"prompt": item} if isinstance(item, str) else item
        rows.append(checked_row(fields, name="prompts", line=line))
    if not rows:
        raise InvalidRow("there are no prompts", field="prompt")
    return rows


def checked_row(fields: Mapping[str, Any], *, name: str, line: int) -> PromptRow:
    """The row with these fields; text is taken for numbers, as CSV has it, and empty text for nothing.

    Raises:
        InvalidRow: a field that is not known or has a wrong value.
    """

    def refuse(field: str, reason: str) -> InvalidRow:
        return InvalidRow(f"{name}, line {line}: {reason}", field=field, line=line)

    values: dict[str, Any] = {}
    for field, value in fields.items():
        if field not in ROW_FIELDS:
            near = difflib.get_close_matches(str(field), ROW_FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ROW_FIELDS)}"
            raise refuse(str(field), f"{field!r} is not a field of a row; {hint}")
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        try:
            values[field] = _CHECKS[field](value)
        except ValueError as error:
            raise refuse(field, f"{field} is {value!r:.80}, expected {error}") from None
    if "prompt" not in values:
        raise refuse("prompt", "prompt is missing or empty")
    return PromptRow(**values, line=line)


# The three forms -----------------------------------------------------------------------------------------

Lines = Iterator[tuple[int, Mapping[str, Any]]]


def _parser(text: str, suffix: str) -> Callable[[str, str], Lines]:
    if suffix in _JSONL_SUFFIXES:
        return _jsonl
    if suffix == ".csv":
        return _csv
    if suffix == "":
        first = next((line.strip() for line in text.split("\n") if line.strip()), "")
        if first.startswith("{"):
            return _jsonl
        if "," in first and set(first.split(",")) <= set(ROW_FIELDS):
            return _csv
    return _text


def _text(text: str, name: str) -> Lines:
    # Not `splitlines`: a prompt may hold U+2028, U+0085 or a form feed, which it takes for the end of a line.
    for line, content in enumerate(text.split("\n"), 1):
        prompt = content.strip()
        if prompt and not prompt.startswith("#"):
            yield line, {"prompt": prompt}


def _jsonl(text: str, name: str) -> Lines:
    # Not `splitlines` either: JSON strings may hold the same.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            value = json.loads(content)
        except ValueError as error:
            raise InvalidRow(f"{name}, line {line}: not JSON: {error}", field="prompt", line=line) from None
        if not isinstance(value, str | dict):
            raise InvalidRow(
                f"{name}, line {line}: expected an object with a prompt, or a string", field="prompt", line=line
            )
        yield line, {"prompt": value} if isinstance(value, str) else value


def _csv(text: str, name: str) -> Lines:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    heading: list[str] = []
    before = 0
    while True:
        line, before = before + 1, reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InvalidRow(f"{name}, line {line}: not CSV: {error}", field="prompt", line=line) from None
        line, before = before + 1, reader.line_num
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if not heading:
            heading = [cell.strip() for cell in cells]
            if "prompt" not in heading or len(set(heading)) != len(heading):
                raise InvalidRow(
                    f"{name}, line {line}: the first line of a CSV names its columns, each once; one is prompt",
                    field="prompt",
                    line=line,
                )
            continue
        if len(cells) > len(heading):
            raise InvalidRow(
                f"{name}, line {line}: {len(cells)} cells under {len(heading)} columns: quote text that has commas",
                field=heading[-1],
                line=line,
            )
        yield line, dict(zip(heading, cells, strict=False))


# Values --------------------------------------------------------------------------------------------------


def _words(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("text")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("text without NUL characters and lone surrogates: no file format holds them")
    return value.strip()


def _whole(least: int, most: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        expected = f"a whole number from {least} to {most}"
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError(expected) from None
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
            raise ValueError(expected)
        return number

    return check


def _scale(value: object) -> float:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
        raise ValueError("a number from 0")
    return float(number)


_CHECKS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "prompt": _words,
    "negative_prompt": _words,
    "seed": _whole(0, _LARGEST_SEED),
    "height": _whole(1, _LONGEST_SIDE_PX),
    "width": _whole(1, _LONGEST_SIDE_PX),
    "steps": _whole(1, _MOST_STEPS),
    "guidance": _scale,
    "num_frames": _whole(1, _LONGEST_SIDE_PX),
}
