"""The figures of docs/decode-speed.md are those that were measured."""

from __future__ import annotations

from tools import decode_speed_page


def test_the_figures_are_current() -> None:
    text = decode_speed_page.PAGE.read_text(encoding="utf-8")
    assert text == decode_speed_page.page(text), "run `python -m tools.decode_speed_page`"


def test_what_was_not_measured_is_said_to_be_so() -> None:
    for kind, path in decode_speed_page.RESULTS.items():
        assert (f"**{kind}**: not measured yet." in decode_speed_page.figures()) == (not path.is_file())
