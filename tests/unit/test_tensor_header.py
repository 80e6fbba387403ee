"""The safetensors header: what we read is what safetensors wrote, what we write is what it would have written.

Literal bytes come from the format's specification (github.com/huggingface/safetensors, README "Format"): 8 bytes of
little-endian length, that much JSON, the data.
"""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from broker_config.errors import (
    InvalidDtype,
    InvalidTensorFile,
    LatentqError,
    NotSafetensors,
    TensorFileOversized,
    TensorFileTruncated,
)
from broker_config.tensor_header import itemsize, memory_order, order_metadata, read_header, write_header

#: A machine that does much else must not fail a test.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

#: A float32 tensor `latents` of shape (1, 2), by hand: 64 (0x40) bytes of header, then 1.0 and -2.0.
BY_HAND = (
    b"\x40\x00\x00\x00\x00\x00\x00\x00"
    b'{"latents":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}  '
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
)

shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
numpy_dtypes = st.sampled_from(["float16", "float32", "uint8"])


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    """The tensor of `BY_HAND`, with changes."""
    return {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]} | changes


# Literal bytes --------------------------------------------------------------------------------------------


def test_a_file_written_by_hand_is_read() -> None:
    header = read_header(BY_HAND)
    assert (header.name, header.dtype, header.shape) == ("latents", "float32", (1, 2))
    assert (header.data_start, header.data_bytes, header.file_bytes) == (72, 8, 80)
    assert struct.unpack("<2f", BY_HAND[header.data_start :]) == (1.0, -2.0)
    assert header.metadata == {}


def test_what_is_written_is_the_file_written_by_hand() -> None:
    assert write_header("float32", (1, 2)) + struct.pack("<2f", 1.0, -2.0) == BY_HAND


def test_data_starts_at_a_multiple_of_eight_bytes() -> None:
    for number in range(12):
        assert len(write_header("float16", (10**number,))) % 8 == 0


@pytest.mark.parametrize(
    ("code", "name", "size"),
    [("F16", "float16", 2), ("BF16", "bfloat16", 2), ("F32", "float32", 4), ("U8", "uint8", 1)],
)
def test_each_dtype_has_its_name_and_size(code: str, name: str, size: int) -> None:
    data = bytes(6 * size)
    header = read_header(file_of({"x": {"dtype": code, "shape": [2, 3], "data_offsets": [0, 6 * size]}}, data))
    assert (header.dtype, header.data_bytes, itemsize(name)) == (name, 6 * size, size)


@pytest.mark.parametrize("dtype", ["float64", "int64", "F32", "", "bool"])
def test_no_other_dtype_has_a_size_or_is_written(dtype: str) -> None:
    for refused in (lambda: itemsize(dtype), lambda: write_header(dtype, (1,))):
        with pytest.raises(InvalidDtype, match="float16, bfloat16, float32: convert") as refusal:
            refused()
        assert refusal.value.code == "latents_dtype"


def test_the_files_own_name_and_metadata_are_read() -> None:
    header = read_header(file_of({"__metadata__": {"format": "pt", "Ä": "ö"}, "a name": entry()}, bytes(8)))
    assert (header.name, header.metadata) == ("a name", {"format": "pt", "Ä": "ö"})


def test_a_header_is_enough_to_judge_a_file_of_any_length() -> None:
    head = write_header("float32", (1, 16, 2**20, 2**20))
    assert read_header(head, total_bytes=len(head) + 4 * 16 * 2**40).shape == (1, 16, 2**20, 2**20)
    with pytest.raises(TensorFileTruncated, match="needs"):
        read_header(head)
    with pytest.raises(TensorFileOversized, match="needs"):
        read_header(head, total_bytes=len(head) + 4 * 16 * 2**40 + 1)


# Round trips with the safetensors package -----------------------------------------------------------------


@unhurried
@given(dtype=numpy_dtypes, shape=shapes)
def test_we_read_what_safetensors_wrote_and_it_reads_what_we_wrote(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    theirs = safetensors.numpy.save({"latents": array})
    header = read_header(theirs)
    assert (header.dtype, header.shape) == (dtype, shape)
    assert theirs[header.data_start :] == array.tobytes()

    ours = write_header(dtype, shape) + array.tobytes()
    assert ours == theirs, "byte for byte"
    back = safetensors.numpy.load(ours)["latents"]
    assert (back.dtype, back.shape) == (array.dtype, shape)
    assert np.array_equal(back, array)


@unhurried
@given(shape=shapes)
def test_bfloat16_goes_both_ways_too(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).to(torch.bfloat16).reshape(shape)
    theirs = safetensors.torch.save({"latents": tensor})
    header = read_header(theirs)
    assert (header.dtype, header.shape) == ("bfloat16", shape)
    assert write_header("bfloat16", shape) + theirs[header.data_start :] == theirs


@unhurried
@given(
    metadata=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])), max_size=4
    )
)
def test_metadata_goes_both_ways(metadata: dict[str, str]) -> None:
    assert read_header(write_header("uint8", (0,), metadata)).metadata == metadata
    assert read_header(safetensors.numpy.save({"x": np.zeros(0, "uint8")}, metadata)).metadata == metadata


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind: Any) -> None:
    assert read_header(kind(BY_HAND)).shape == (1, 2)


# Attacks --------------------------------------------------------------------------------------------------

ATTACKS: dict[str, tuple[bytes, type[InvalidTensorFile | InvalidDtype]]] = {
    "nothing": (b"", TensorFileTruncated),
    "half a length": (b"\x40\x00\x00\x00", TensorFileTruncated),
    "a length and no header": (struct.pack("<Q", 64), TensorFileTruncated),
    "a length of 0": (struct.pack("<Q", 0) + b"{}", NotSafetensors),
    "a length of 1": (struct.pack("<Q", 1) + b"{}", NotSafetensors),
    "the largest length": (struct.pack("<Q", 2**64 - 1) + b"{}", TensorFileOversized),
    "a length that wraps around": (struct.pack("<Q", 2**64 - 8) + b"{}", TensorFileOversized),
    "a negative length": (struct.pack("<q", -1) + b"{}", TensorFileOversized),
    "a big-endian length": (struct.pack(">Q", 64) + BY_HAND[8:], TensorFileOversized),
    "a header above the limit": (file_of(b"{" + b" " * (256 * 1024) + b"}"), TensorFileOversized),
    "a header that is a list": (struct.pack("<Q", 2) + b"[]", NotSafetensors),
    "a header after a space": (file_of(b' {"latents":{}}'), NotSafetensors),
    "a header that ends early": (file_of(b'{"latents":'), NotSafetensors),
    "a header in UTF-16": (file_of(json.dumps({"latents": entry()}).encode("utf-16-le"), bytes(8)), NotSafetensors),
    "a header that is no UTF-8": (file_of(b'{"\xff":1}'), NotSafetensors),
    "a nesting bomb": (file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), NotSafetensors),
    "a number of 200,000 digits": (file_of(b'{"a":' + b"9" * 200_000 + b"}"), NotSafetensors),
    "metadata that is a list": (file_of({"__metadata__": [], "latents": entry()}, bytes(8)), NotSafetensors),
    "metadata that holds a number": (file_of({"__metadata__": {"a": 1}, "x": entry()}, bytes(8)), NotSafetensors),
    "metadata alone": (file_of({"__metadata__": {}}), InvalidTensorFile),
    "two tensors": (file_of({"a": entry(), "b": entry()}, bytes(8)), InvalidTensorFile),
    "no shape": (file_of({"latents": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), NotSafetensors),
    "an entry that is null": (file_of({"latents": None}), NotSafetensors),
    "an entry that is a list": (file_of({"latents": [1, 2]}), NotSafetensors),
    "a shape that is a number": (file_of({"latents": entry(shape=2)}, bytes(8)), NotSafetensors),
    "a shape of strings": (file_of({"latents": entry(shape=["1", "2"])}, bytes(8)), NotSafetensors),
    "a shape of fractions": (file_of({"latents": entry(shape=[1.0, 2.0])}, bytes(8)), NotSafetensors),
    "a shape of truths": (file_of({"latents": entry(shape=[True, True])}, bytes(4)), NotSafetensors),
    "a negative size": (file_of({"latents": entry(shape=[-1, -2])}, bytes(8)), NotSafetensors),
    "a size of 2⁶⁴": (file_of({"latents": entry(shape=[2**64, 0], data_offsets=[0, 0])}), NotSafetensors),
    "nine dimensions": (file_of({"latents": entry(shape=[1] * 8 + [2])}, bytes(8)), NotSafetensors),
    "a shape that overflows 64 bits": (
        file_of({"latents": entry(shape=[2**32, 2**32], data_offsets=[0, 0])}),
        InvalidTensorFile,
    ),
    "offsets that overlap the header": (file_of({"latents": entry(data_offsets=[-8, 0])}, bytes(8)), InvalidTensorFile),
    "offsets with a gap": (file_of({"latents": entry(data_offsets=[8, 16])}, bytes(16)), InvalidTensorFile),
    "offsets that say less than the shape": (
        file_of({"latents": entry(data_offsets=[0, 4])}, bytes(4)),
        InvalidTensorFile,
    ),
    "offsets that say more than the shape": (
        file_of({"latents": entry(data_offsets=[0, 16])}, bytes(16)),
        InvalidTensorFile,
    ),
    "offsets that are no list": (file_of({"latents": entry(data_offsets="0,8")}, bytes(8)), InvalidTensorFile),
    "no offsets": (file_of({"latents": {"dtype": "F32", "shape": [1, 2]}}, bytes(8)), InvalidTensorFile),
    "less data than the header says": (BY_HAND[:-1], TensorFileTruncated),
    "more data than the header says": (BY_HAND + b"\0", TensorFileOversized),
    "a dtype that is a list": (file_of({"latents": entry(dtype=["F32"])}, bytes(8)), InvalidDtype),
    "a dtype that is an object": (file_of({"latents": entry(dtype={"F32": 1})}, bytes(8)), InvalidDtype),
    "a dtype that is null": (file_of({"latents": entry(dtype=None)}, bytes(8)), InvalidDtype),
    "a dtype in lower case": (file_of({"latents": entry(dtype="f32")}, bytes(8)), InvalidDtype),
}


@pytest.mark.parametrize(("data", "kind"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_refused_by_name(data: bytes, kind: type[LatentqError]) -> None:
    with pytest.raises(kind) as refusal:
        read_header(data)
    assert type(refusal.value) is kind


@pytest.mark.parametrize(
    "hostile",
    ["\x1b[31mred", "two\nlines", "\ud800", "x" * 200_000, "\u202etfel ot thgir"],
    ids=["escape codes", "line break", "lone surrogate", "long", "right to left"],
)
def test_what_a_file_says_cannot_spoil_the_message(hostile: str) -> None:
    files = [
        file_of({hostile: entry(), "b": entry()}, bytes(8)),
        file_of({hostile: entry(dtype="F64")}, bytes(8)),
        file_of({"latents": entry(dtype=hostile)}, bytes(8)),
        file_of({hostile: entry(data_offsets=[0, 9])}, bytes(9)),
        file_of({"latents": entry(data_offsets=[hostile])}, bytes(9)),
    ]
    for data in files:
        with pytest.raises((InvalidTensorFile, InvalidDtype)) as refusal:
            read_header(data)
        message = refusal.value.message
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-(2**70), 2**70) | st.integers(0, 8)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F16", "BF16", "F32", "U8", "F64"]) | json_values,
        "shape": st.lists(sizes, max_size=10) | json_values,
        "data_offsets": st.lists(sizes, max_size=3) | json_values,
        "more": json_values,
    },
)
headers = st.dictionaries(st.sampled_from(["latents", "__metadata__", "x"]), entries | json_values, max_size=3)
files = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda length, rest: struct.pack("<Q", length) + rest, st.integers(0, 2**64 - 1), st.binary(max_size=99)),
    st.builds(lambda text, data: file_of(b"{" + text, data), st.binary(max_size=99), st.binary(max_size=99)),
    st.builds(lambda header, data: file_of(json.dumps(header).encode(), data), headers, st.binary(max_size=99)),
)


@settings(unhurried, max_examples=400)
@given(data=files)
@example(data=BY_HAND)
def test_whatever_the_bytes_nothing_is_raised_but_our_refusals_and_little_is_allocated(data: bytes) -> None:
    tracemalloc.start()
    try:
        try:
            header = read_header(data)
        except (InvalidTensorFile, InvalidDtype):
            header = None
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000
    if header is not None:
        assert header.file_bytes == len(data)
        assert len(header.shape) <= 8


@settings(unhurried, max_examples=200)
@given(data=st.data(), dtype=numpy_dtypes, shape=shapes)
def test_a_file_with_a_byte_changed_is_read_as_safetensors_reads_it_or_refused(
    data: st.DataObject, dtype: str, shape: tuple[int, ...]
) -> None:
    whole = bytearray(safetensors.numpy.save({"latents": np.zeros(shape, dtype)}))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read_header(bytes(whole))
    except (InvalidTensorFile, InvalidDtype):
        return
    ((name, theirs),) = safetensors.deserialize(bytes(whole))  # type: ignore[no-untyped-call]
    assert (header.name, list(header.shape)) == (name, theirs["shape"])
    assert len(theirs["data"]) == header.data_bytes


def test_the_order_in_memory_is_in_the_metadata_and_c_order_is_not() -> None:
    header = write_header("float32", (1, 2, 3, 4), order_metadata((0, 2, 3, 1)))
    assert b'"__metadata__":{"latentq.order":"0,2,3,1"}' in header
    assert memory_order(read_header(header, total_bytes=len(header) + 96)) == (0, 2, 3, 1)
    assert write_header("float32", (1, 2), order_metadata(None)) == BY_HAND[: len(write_header("float32", (1, 2)))]


@pytest.mark.parametrize("said", ["", "0,1,2", "0,1", "2,1,0,3", "0,0,1", "2,1,-1", "2,1,x", "02,1,0", "2, 1, 0"])
def test_what_is_no_order_of_the_dimensions_is_taken_for_none(said: str) -> None:
    header = write_header("float32", (1, 2, 3), {"latentq.order": said})
    assert memory_order(read_header(header, total_bytes=len(header) + 24)) is None
