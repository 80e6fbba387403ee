"""The tables of docs/vaes.md are what the catalogue and the table of pipelines say; no family goes without a test."""

from __future__ import annotations

from broker_config.latent_geometry import LatentLayout
from tools import vae_table


def test_the_tables_are_current() -> None:
    text = vae_table.PAGE.read_text(encoding="utf-8")
    assert text == vae_table.page(text), "run `python -m tools.vae_table`"


def test_every_family_but_the_demo_has_a_parity_test() -> None:
    rows = [line.split("|") for line in vae_table.families().splitlines()[2:]]
    without = [row[1].strip() for row in rows if row[-2].strip() == "none"]
    assert without == ["`demo`"], "the demo's own tests are in tests/demo_vae"


def test_every_family_with_pipelines_has_one_that_is_called_whole() -> None:
    rows = [[cell.strip() for cell in line.split("|")] for line in vae_table.families().splitlines()[2:]]
    assert len(rows) > 80
    assert [row[1] for row in rows if row[-4] != "–" and row[-3] == "–"] == []


def test_every_layout_is_some_familys() -> None:
    text = vae_table.families()
    unused = [layout for layout in LatentLayout if f"`{layout}`" not in text]
    assert unused == []
