"""Bad options, metadata and ids are refused at the door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from broker_config.errors import (
    InvalidOption,
)
from tests.support.door import GOOD, Door
from worker.image_encoding import encode_image

# Options --------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")

BAD_OPTIONS: Mapping[str, list[Any]] = {
    "height": [0, -64, 64.0, "64", True, NAN],
    "width": [0, -64, 64.0, "64", True, NAN],
    "num_frames": [0, -1, 1.0, "1", False],
    "fps": [0, -8, 240.5, 0.0001, NAN, INF, "24", True],
    "output": ["gif", "PNG", "", 3],
    "mode": ["quick", "", True],
    "priority": ["urgent", "", None, 0],
    "timeout_s": [0, -1, NAN, INF, "60", True, 31_536_001],
    "start_within_s": [0, -1, NAN, INF, "60", True, 31_536_001],
    "retention_s": [0, -1, NAN, INF, "60", True, 31_536_001],
    "scaling_factor": [0, 0.0, NAN, INF, "0.5", True],
    "shift_factor": [NAN, INF, "0.5", True],
    "provenance": ["no", 0, None],
    "allow_tiling": ["no", 0, None],
    "job_id": ["", "a b", "a:b", "../a", "ä", "a\n", "a" * 65, 7, b"a"],
}
#: What the message says of each: what would be right, or what to do.
FIXES = {
    "height": "whole number above 0",
    "width": "whole number above 0",
    "num_frames": "whole number above 0",
    "fps": "from 0.001 to 240",
    "output": "png, jpg, webp, mp4, tensor, uint8",
    "mode": "exact, fast",
    "priority": "high, normal, low",
    "timeout_s": "seconds above 0, at most a year",
    "start_within_s": "seconds above 0, at most a year",
    "retention_s": "seconds above 0, at most a year",
    "scaling_factor": "finite number",
    "shift_factor": "finite number",
    "provenance": "True or False",
    "allow_tiling": "True or False",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, bad in BAD_OPTIONS.items() for value in bad])
def test_a_bad_value_of_an_option(door: Door, name: str, value: Any) -> None:
    with door.refuses(InvalidOption, code="invalid_option", field=name, words=f"{name} | {FIXES.get(name, 'job_id')}"):
        door.client.submit(GOOD, vae="sd", **{name: value})


@pytest.mark.parametrize("name", ["ouput", "Output", "colour", "metdata", "webhok", "output "])
def test_an_option_that_does_not_exist_or_is_misspelt(door: Door, name: str) -> None:
    words = f"{name} is not an option | metadata, | output, | priority, | width"
    options: dict[str, Any] = {name: "png"}
    with door.refuses(InvalidOption, code="invalid_option", field=name, words=words):
        door.client.submit(GOOD, vae="sd", **options)


def test_mp4_of_pictures(door: Door) -> None:
    words = "needs a clip | choose png"
    with door.refuses(InvalidOption, code="invalid_option", field="output", words=words):
        door.client.submit(GOOD, vae="sd", output="mp4")


@pytest.mark.parametrize(
    ("output", "shape", "words"),
    [
        ("jpg", (1, 4, 1, 8188), "65500 px a side | 65504 × 8 | choose png"),
        ("jpg", (1, 4, 8188, 1), "65500 px a side | 8 × 65504 | choose png"),
        ("webp", (1, 4, 1, 2048), "16383 px a side | 16384 × 8 | choose png"),
        ("webp", (1, 4, 2048, 1), "16383 px a side | 8 × 16384 | choose png"),
        ("mp4", (1, 4, 2, 1, 2049), "16384 px a side | 16392 × 8 | choose uint8"),
        ("mp4", (1, 4, 2, 2049, 1), "16384 px a side | 8 × 16392 | choose uint8"),
    ],
)
def test_a_side_that_the_format_cannot_hold(door: Door, output: str, shape: tuple[int, ...], words: str) -> None:
    with door.refuses(InvalidOption, code="invalid_option", field="output", words=words):
        door.client.submit(torch.zeros(shape), vae="sd", output=output)


@pytest.mark.parametrize(
    ("output", "shape"),
    [("jpg", (1, 4, 1, 8187)), ("webp", (1, 4, 1, 2047)), ("mp4", (1, 4, 2, 1, 2048)), ("png", (1, 4, 1, 8188))],
)
def test_the_longest_side_that_the_format_holds_is_taken(door: Door, output: str, shape: tuple[int, ...]) -> None:
    assert door.client.submit(torch.zeros(shape), vae="sd", output=output).cancel() == "canceled"


# Metadata and ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("prompt", "not a map"),
        ([("prompt", "a cat")], "not a map"),
        ({"seed": 42}, "metadata['seed'] is not a string | convert"),
        ({"seed": None}, "metadata['seed'] is not a string | convert"),
        ({42: "seed"}, "metadata[42] is not a string | convert"),
        ({b"seed": "42"}, "metadata[b'seed'] is not a string | convert"),
        ({"": "x"}, "1 to 79 printable latin-1 characters"),
        ({"k" * 80: "x"}, "1 to 79 printable latin-1 characters"),
        ({"a\0b": "x"}, "1 to 79 printable latin-1 characters"),
        ({"a\nb": "x"}, "1 to 79 printable latin-1 characters"),
        ({" seed": "x"}, "without outer or double spaces"),
        ({"seed ": "x"}, "without outer or double spaces"),
        ({"the  seed": "x"}, "without outer or double spaces"),
        ({"提示": "x"}, "1 to 79 printable latin-1 characters"),
        ({"\ud800": "x"}, "1 to 79 printable latin-1 characters"),
        ({"latentq": "x"}, "'latentq' is taken | rename"),
        ({"prompt": "a\0b"}, "metadata['prompt'] | NUL | remove"),
        ({"prompt": "a\ud800b"}, "metadata['prompt'] | lone surrogate | remove"),
        ({"prompt": "\udfff"}, "metadata['prompt'] | lone surrogate | remove"),
        ({"prompt": "x" * 16_384}, "16398 bytes | 16384 | LATENTQ_MAX_METADATA_BYTES"),
    ],
    ids=lambda item: ascii(item)[:40],
)
def test_metadata_that_no_file_could_hold(door: Door, metadata: Any, words: str) -> None:
    with door.refuses(InvalidOption, code="invalid_option", field="metadata", words=words):
        door.client.submit(GOOD, vae="sd", metadata=metadata)


def test_more_metadata_than_a_jpg_holds(make_door: Callable[..., Door]) -> None:
    door = make_door(max_metadata_bytes=1 << 20)
    metadata = {"prompt": "x" * 31_000}  # 62,028 bytes in UTF-16, of the 65,533 that a JPEG segment holds
    with door.refuses(InvalidOption, code="invalid_option", field="metadata", words="jpg | UTF-16 | choose png"):
        door.client.submit(GOOD, vae="sd", output="jpg", metadata=metadata)
    assert door.client.submit(GOOD, vae="sd", output="png", metadata=metadata).cancel() == "canceled"


def test_a_jpg_holds_all_the_metadata_that_the_door_lets_through(make_door: Callable[..., Door]) -> None:
    metadata = {"prompt": "x" * ((61_000 - 2 * len('{"prompt": ""}')) // 2)}
    door = make_door(max_metadata_bytes=1 << 20)
    assert door.client.submit(GOOD, vae="sd", output="jpg", metadata=metadata).cancel() == "canceled"
    provenance = {"job_id": "j" * 64, "weights": {"weights": "/" + "w" * 1_000, "sha256": "0" * 64}, "more": "m" * 700}
    pixels = np.zeros((8, 8, 3), np.uint8)
    assert encode_image(pixels, output="jpg", metadata=metadata, provenance=provenance).extension == "jpg"


def test_a_bad_id_for_a_job_that_is_decoded_again(door: Door) -> None:
    job = door.client.submit(GOOD, vae="sd")
    before = sorted(door.admin.keys("*"))
    with pytest.raises(InvalidOption, match="A-Z a-z 0-9 _ -") as refusal:
        job.redecode(job_id="a:b")
    assert (refusal.value.code, refusal.value.field) == ("invalid_option", "job_id")
    assert sorted(door.admin.keys("*")) == before
    job.cancel()
