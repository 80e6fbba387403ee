"""The manifest outlives being killed in the middle of a line, and has one writer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from broker_config.errors import ConfigurationError
from producer.prompt_farm.destination import Folder, write_durably
from producer.prompt_farm.manifest import Manifest


def line(number: int) -> bytes:
    return json.dumps({"job_id": f"farm-{number}", "file": f"{number}.png"}).encode() + b"\n"


def test_lines_are_there_after_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "new" / "manifest.jsonl"
    first = Manifest(path)
    first.append({"job_id": "farm-1", "prompt": "ein Löwe", "file": "1.png"})
    first.append({"job_id": "farm-2", "prompt": "b", "file": "2.png"})
    first.close()
    again = Manifest(path)
    assert list(again.rows) == ["farm-1", "farm-2"]
    assert again.rows["farm-1"]["prompt"] == "ein Löwe"
    assert again.torn_bytes == 0
    again.close()


@pytest.mark.parametrize("cut", range(1, len(line(2)) + 1))
def test_a_line_torn_anywhere_is_cut_off_and_the_next_one_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(line(1) + line(2)[:-cut])
    manifest = Manifest(path)
    assert list(manifest.rows) == ["farm-1"]
    assert manifest.torn_bytes == len(line(2)) - cut
    manifest.append(json.loads(line(3)))
    manifest.close()
    assert [json.loads(text)["job_id"] for text in path.read_bytes().splitlines()] == ["farm-1", "farm-3"]


@pytest.mark.parametrize("rest", [b"\0" * 40, b"\0" * 40 + b"\n", b'{"job_id": 1\n', b"[]\n"])
def test_what_a_loss_of_power_leaves_is_cut_off(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(line(1) + rest)
    manifest = Manifest(path)
    assert list(manifest.rows) == ["farm-1"]
    manifest.close()
    assert path.read_bytes() == line(1)


def test_damage_in_the_middle_is_not_repaired_silently(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(line(1) + b"{oops\n" + line(3))
    with pytest.raises(ConfigurationError, match="line 2 of the manifest"):
        Manifest(path)
    assert path.read_bytes() == line(1) + b"{oops\n" + line(3)


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    first = Manifest(tmp_path / "manifest.jsonl")
    with pytest.raises(ConfigurationError, match="another run writes"):
        Manifest(tmp_path / "manifest.jsonl")
    first.close()
    Manifest(tmp_path / "manifest.jsonl").close()


def test_the_copy_from_a_bucket_is_taken_where_it_knows_more(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(line(1))
    manifest = Manifest(path, copy=line(1) + line(2))
    assert list(manifest.rows) == ["farm-1", "farm-2"]
    manifest.close()
    manifest = Manifest(path, copy=line(1))
    assert list(manifest.rows) == ["farm-1", "farm-2"]
    manifest.close()


def test_lines_of_another_machine_are_added_and_none_of_ones_own_goes(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(line(1) + line(2))
    torn = line(5)[:-3]
    Manifest(path, copy=line(3) + line(2) + line(4) + torn).close()
    assert path.read_bytes() == line(1) + line(2) + line(3) + line(4)
    with pytest.raises(ConfigurationError, match="line 1 of the manifest the copy"):
        Manifest(path, copy=b"{oops\n" + line(6))
    assert path.read_bytes() == line(1) + line(2) + line(3) + line(4)


def test_a_second_run_does_not_touch_the_file_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    first = Manifest(path)
    with pytest.raises(ConfigurationError, match="another run writes"):
        Manifest(path, copy=line(1) + line(2))
    first.append({"job_id": "farm-9"})
    assert b"farm-9" in path.read_bytes()
    first.close()


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    write_durably(tmp_path / "a.png", b"old")
    write_durably(tmp_path / "a.png", b"new")
    assert os.listdir(tmp_path) == ["a.png"]
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_durably(tmp_path / "b.png", b"new")
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


def test_a_folder_makes_the_folders_of_its_names_and_knows_what_it_has(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    folder.check()
    folder.write("7/a.png", b"bytes")
    assert (tmp_path / "out/7/a.png").read_bytes() == b"bytes"
    assert folder.present({"7/a.png"}) == {"7/a.png"}
    assert folder.present({"7/b.png"}) == set()
    assert folder.present({"7"}) == set()
