"""Rows are read from text, JSONL and CSV, and what is malformed is refused with its line and field."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from broker_config.errors import ConfigurationError, InvalidRow
from producer.prompt_farm.rows import PromptRow, parse_rows, read_rows, rows_of


def test_text_has_a_prompt_a_line() -> None:
    text = "a fox in the snow\n\n# a remark\n  an old map  \r\nein Löwe, gemalt\n"
    assert parse_rows(text.encode(), name="p", suffix=".txt") == [
        PromptRow(prompt="a fox in the snow", line=1),
        PromptRow(prompt="an old map", line=4),
        PromptRow(prompt="ein Löwe, gemalt", line=5),
    ]


@pytest.mark.parametrize("sign", ["\u2028", "\u0085", "\x0b", "\x0c"])
def test_a_prompt_ends_at_a_line_feed_and_at_no_other_sign(sign: str) -> None:
    found = parse_rows(f"an old{sign}map\r\na fox\n".encode(), name="p", suffix=".txt")
    assert [(row.prompt, row.line) for row in found] == [(f"an old{sign}map", 1), ("a fox", 2)]


def test_jsonl_has_every_field() -> None:
    text = (
        '{"prompt": "a fox", "negative_prompt": "blurry", "seed": 7, "height": 512, "width": 768, "steps": 20,'
        ' "guidance": 3.5, "num_frames": 49}\n\n"an old\\u2028map"\n{"prompt": "x", "seed": null}\n'
    )
    assert parse_rows(text.encode(), name="p", suffix=".jsonl") == [
        PromptRow(
            prompt="a fox",
            negative_prompt="blurry",
            seed=7,
            height=512,
            width=768,
            steps=20,
            guidance=3.5,
            num_frames=49,
            line=1,
        ),
        PromptRow(prompt="an old\u2028map", line=3),
        PromptRow(prompt="x", line=4),
    ]


def test_csv_names_its_columns_and_counts_lines_of_the_file() -> None:
    text = 'seed,prompt,guidance\n1,"a fox, in\nthe snow",2\n,an old map,\n\n9,a door\n'
    rows = parse_rows(text.encode("utf-8-sig"), name="p", suffix=".csv")
    assert rows == [
        PromptRow(prompt="a fox, in\nthe snow", seed=1, guidance=2.0, line=2),
        PromptRow(prompt="an old map", line=4),
        PromptRow(prompt="a door", seed=9, line=6),
    ]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ('{"prompt": "a fox"}\n', PromptRow(prompt="a fox", line=1)),
        ("seed,prompt\n3,a fox\n", PromptRow(prompt="a fox", seed=3, line=2)),
        ("a fox, in the snow\n", PromptRow(prompt="a fox, in the snow", line=1)),
    ],
)
def test_standard_input_tells_its_form_by_the_first_line(
    text: str, first: PromptRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert read_rows("-") == [first]


@pytest.mark.parametrize(
    ("suffix", "text", "line", "field", "words"),
    [
        (".jsonl", '{"prompt": "a"}\n{"prompt": "b", "heigth": 512}', 2, "heigth", "did you mean height?"),
        (".jsonl", '{"prompt": "a", "height": "tall"}', 1, "height", "height is 'tall'"),
        (".jsonl", '{"prompt": "a", "height": 0}', 1, "height", "from 1 to"),
        (".jsonl", '{"prompt": "a", "steps": 2.5}', 1, "steps", "steps is 2.5"),
        (".jsonl", '{"prompt": "a", "steps": true}', 1, "steps", "steps is True"),
        (".jsonl", '{"prompt": "a", "seed": -1}', 1, "seed", "seed is -1"),
        (".jsonl", '{"prompt": "a", "seed": 9223372036854775808}', 1, "seed", "from 0 to 9223372036854775807"),
        (".jsonl", '{"prompt": "a", "guidance": NaN}', 1, "guidance", "guidance is nan"),
        (".jsonl", '{"prompt": "a", "guidance": [1]}', 1, "guidance", "guidance is [1]"),
        (".jsonl", '{"prompt": 7}', 1, "prompt", "prompt is 7, expected text"),
        (".jsonl", '{"prompt": "a\\u0000"}', 1, "prompt", "NUL"),
        (".jsonl", '{"prompt": "\\ud800"}', 1, "prompt", "surrogates"),
        (".jsonl", '{"seed": 1}', 1, "prompt", "prompt is missing"),
        (".jsonl", '{"prompt": "  "}', 1, "prompt", "prompt is missing or empty"),
        (".jsonl", '\n{"prompt": "a"', 2, "prompt", "not JSON"),
        (".jsonl", '["a"]', 1, "prompt", "expected an object"),
        (".csv", "text,seed\na,1\n", 1, "prompt", "one is prompt"),
        (".csv", "prompt,prompt\na,b\n", 1, "prompt", "each once"),
        (".csv", "prompt,seed\na,1\nb, c,2\n", 3, "seed", "3 cells under 2 columns"),
        (".csv", 'prompt,seed\na,1\n"b,2\n', 3, "prompt", "not CSV"),
        (".csv", "prompt,seed\na,\nb,many\n", 3, "seed", "seed is 'many'"),
        (".txt", "# nothing\n\n", None, "prompt", "has no prompts"),
        (".txt", "", None, "prompt", "has no prompts"),
    ],
)
def test_a_malformed_row_is_refused_with_line_and_field(
    suffix: str, text: str, line: int | None, field: str, words: str
) -> None:
    with pytest.raises(InvalidRow) as refused:
        parse_rows(text.encode(), name="prompts", suffix=suffix)
    assert (refused.value.line, refused.value.field) == (line, field)
    assert words in refused.value.message
    assert line is None or f"line {line}" in refused.value.message


def test_bytes_that_are_not_utf_8_are_refused_with_their_line() -> None:
    with pytest.raises(InvalidRow, match="line 2: not UTF-8"):
        parse_rows(b"a fox\nein L\xf6we\n", name="prompts")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        read_rows(str(tmp_path / "prompts.txt"))


def test_rows_come_from_python_values_too() -> None:
    row = PromptRow(prompt="c", seed=1, line=40)
    assert rows_of(["a", {"prompt": "b", "steps": 2}, row]) == [
        PromptRow(prompt="a", line=1),
        PromptRow(prompt="b", steps=2, line=2),
        PromptRow(prompt="c", seed=1, line=3),
    ]
    with pytest.raises(InvalidRow, match="line 2: steps"):
        rows_of(["a", {"prompt": "b", "steps": 0}])
