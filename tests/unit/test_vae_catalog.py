"""The catalogue: ours says what the VAEs' configs say, a user's file adds and replaces, errors name the entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker_config.errors import CatalogInvalid, UnknownLayout, UnknownVae
from broker_config.vae_catalog import VaeCatalog

GOOD = """
[mine]
title = "my own"
weights = "me/my-vae"
vae_class = "AutoencoderKL"
channels = 4
spatial = 8
layouts = ["unpacked"]
"""


def load(tmp_path: Path, text: str | bytes) -> VaeCatalog:
    path = tmp_path / "own.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return VaeCatalog.load(path)


# Ours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "vae_class", "channels", "spatial", "temporal", "layouts"),
    [
        ("sd", "AutoencoderKL", 4, 8, 1, ["unpacked", "video_2d"]),
        ("sdxl", "AutoencoderKL", 4, 8, 1, ["unpacked", "video_2d"]),
        ("flux", "AutoencoderKL", 16, 8, 1, ["packed", "unpacked"]),
        ("hunyuanvideo", "AutoencoderKLHunyuanVideo", 16, 8, 4, ["video", "video_sections"]),
    ],
)
def test_the_remote_vae_families_are_in_with_their_published_sizes(
    name: str, vae_class: str, channels: int, spatial: int, temporal: int, layouts: list[str]
) -> None:
    entry = VaeCatalog.load()[name]
    assert (entry.vae_class, entry.channels, entry.spatial, entry.temporal) == (vae_class, channels, spatial, temporal)
    assert list(entry.layouts) == layouts


def test_every_entry_of_ours_says_where_it_was_read_and_needs_no_folder_of_this_machine() -> None:
    catalog = VaeCatalog.load()
    assert len(catalog) >= 5
    for name, entry in catalog.items():
        assert entry.name == name
        assert entry.source != "the user's catalogue"
        assert not Path(entry.weights).is_absolute()


def test_a_name_that_is_not_in_it_is_refused_with_those_near_it() -> None:
    catalog = VaeCatalog.load()
    with pytest.raises(UnknownVae) as refusal:
        catalog["stable-diffusion"]
    assert (refusal.value.code, refusal.value.field) == ("unknown_vae", "vae")
    assert f"lists all {len(catalog)}" in refusal.value.message
    assert "LATENTQ_CATALOG" in refusal.value.message
    assert "stable-diffusion" not in catalog
    with pytest.raises(UnknownVae, match="near it are flux"):
        catalog["flux1"]


# A layout of an entry -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted", "rank", "expected"),
    [
        ("flux", None, None, "packed"),
        ("flux", None, 3, "packed"),
        ("flux", None, 4, "unpacked"),
        ("flux", "unpacked", 3, "unpacked"),
        ("sd", None, 4, "unpacked"),
        ("sd", None, 5, "video_2d"),
        ("sd", None, 3, "unpacked"),
        ("hunyuanvideo", None, 5, "video"),
    ],
)
def test_without_a_layout_the_one_that_fits_the_rank_is_taken_else_the_first(
    name: str, wanted: str | None, rank: int | None, expected: str
) -> None:
    assert VaeCatalog.load()[name].layout(wanted, rank=rank) == expected


def test_a_layout_of_another_vae_is_refused_with_those_it_takes() -> None:
    with pytest.raises(UnknownLayout, match="one of flux's: packed, unpacked") as refusal:
        VaeCatalog.load()["flux"].layout("video")
    assert (refusal.value.code, refusal.value.field) == ("unknown_layout", "layout")


# A user's own file ----------------------------------------------------------------------------------------


def test_an_own_file_adds_entries_and_keeps_ours(tmp_path: Path) -> None:
    catalog = load(tmp_path, GOOD)
    assert set(catalog) == {*VaeCatalog.load(), "mine"}
    mine = catalog["mine"]
    assert (mine.title, mine.weights, mine.channels, mine.spatial) == ("my own", "me/my-vae", 4, 8)
    assert (mine.dtype, mine.temporal, mine.fps, mine.subfolder, mine.revision) == ("auto", 1, 16.0, None, None)


def test_an_own_entry_replaces_ours_as_a_whole(tmp_path: Path) -> None:
    catalog = load(tmp_path, GOOD.replace("[mine]", "[flux]"))
    assert set(catalog) == set(VaeCatalog.load())
    assert (catalog["flux"].channels, catalog["flux"].subfolder) == (4, None)


@pytest.mark.parametrize(
    "weights", ["owner/name", "owner/name-1.0_x", "name", "latentq:demo", "/abs/olute/folder", "/with space/ü"]
)
def test_weights_are_a_repo_or_an_absolute_folder(tmp_path: Path, weights: str) -> None:
    assert load(tmp_path, GOOD.replace("me/my-vae", weights))["mine"].weights == weights


def test_a_folder_in_the_home_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load(tmp_path, GOOD.replace("me/my-vae", "~/vaes/mine"))["mine"].weights == "/home/someone/vaes/mine"


REQUIRED = ["title", "weights", "vae_class", "channels", "spatial", "layouts"]


@pytest.mark.parametrize("field", REQUIRED)
def test_an_entry_without_a_required_field_is_refused_by_both_names(tmp_path: Path, field: str) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{field} ")]
    with pytest.raises(CatalogInvalid, match=rf"\[mine\]: {field}: Field required") as refusal:
        load(tmp_path, "\n".join(lines))
    assert (refusal.value.code, refusal.value.field) == ("catalog_invalid", "mine")
    assert str(tmp_path / "own.toml") in refusal.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("title", "3"),
        ("weights", '"../folder"'),
        ("weights", '"./folder"'),
        ("weights", '"one/two/three"'),
        ("weights", '"https://example.org/vae"'),
        ("weights", '""'),
        ("weights", "3"),
        ("subfolder", "3"),
        ("revision", "3"),
        ("vae_class", '"Auto Encoder"'),
        ("vae_class", '"os.system"'),
        ("vae_class", '""'),
        ("dtype", '"float64"'),
        ("dtype", '"BF16"'),
        ("channels", "0"),
        ("channels", "-4"),
        ("channels", "4.5"),
        ("channels", '"four"'),
        ("spatial", "0"),
        ("temporal", "0"),
        ("layouts", "[]"),
        ("layouts", '["sideways"]'),
        ("layouts", '"unpacked"'),
        ("fps", "0"),
        ("fps", "241"),
        ("fps", "nan"),
        ("latent_channels", "4"),
        ("trust_remote_code", "true"),
    ],
)
def test_a_bad_value_is_refused_by_entry_and_field(tmp_path: Path, field: str, value: str) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{field} ")]
    with pytest.raises(CatalogInvalid, match=rf"\[mine\]: {field}[.:]") as refusal:
        load(tmp_path, "\n".join([*lines, f"{field} = {value}"]))
    assert refusal.value.field == "mine"
    assert str(tmp_path / "own.toml") in refusal.value.message
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("name", ["Mine", "my vae", "-mine", "../mine", "a.b", "ä", "m" * 33, ""])
def test_a_name_that_could_not_be_part_of_a_queues_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CatalogInvalid, match="lower-case letters, digits, - and _") as refusal:
        load(tmp_path, GOOD.replace("[mine]", f'["{name}"]'))
    assert refusal.value.field == name


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogInvalid, match=r"entry \[mine\]: `name` is the heading"):
        load(tmp_path, GOOD + 'name = "other"\n')
    with pytest.raises(CatalogInvalid, match="is not TOML"):
        load(tmp_path, GOOD + GOOD)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mine = 3", r"\[mine\] is not an entry"),
        ("[mine", "is not TOML"),
        ("just words", "is not TOML"),
        (b"[mine]\ntitle = '\xff'", "cannot be read"),
    ],
)
def test_a_file_that_is_no_catalogue_is_refused_by_its_path(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(CatalogInvalid, match=words) as refusal:
        load(tmp_path, text)
    assert str(tmp_path / "own.toml") in refusal.value.message


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(CatalogInvalid, match="cannot be read") as refusal:
            VaeCatalog.load(path)
        assert str(path) in refusal.value.message
        assert refusal.value.field == "catalog"
