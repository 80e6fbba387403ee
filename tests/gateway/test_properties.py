"""Whatever a header, a query or a tensor file says: an answer that is documented, and never an error of ours."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest
import requests
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from multidict import MultiDict

from broker_config.embedded_broker import EmbeddedBroker
from broker_config.errors import InvalidJob, RangeNotSatisfiable
from broker_config.settings import load_settings
from producer.gateway.byte_ranges import byte_range
from producer.gateway.query import OPTIONS, options_of
from tests.gateway.conftest import SAFETENSORS
from tests.support.gateways import RunningGateway

_SHARED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """One gateway for all examples."""
    with EmbeddedBroker(tmp_path_factory.mktemp("broker"), max_memory_bytes=128 << 20) as broker:
        made = load_settings(redis_url=broker.url, max_latents_bytes=4096, _env_file=None)
        with RunningGateway(made) as running:
            yield running


# Range ----------------------------------------------------------------------------------------------------------

_numbers = st.integers(0, 40).map(str) | st.just("") | st.integers(0, 10**30).map(str)


@given(st.builds("bytes={}-{}".format, _numbers, _numbers) | st.text(max_size=40), st.integers(0, 30))
@example("bytes=0-", 0)
@example("bytes=-0", 5)
@example("bytes=٣-٤", 10)
def test_a_range_is_inside_or_the_whole_or_refused(header: str, size: int) -> None:
    try:
        found = byte_range(header, size)
    except RangeNotSatisfiable:
        return
    if found is not None:
        first, end = found
        assert 0 <= first < end <= size
        assert header.strip().startswith("bytes")


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 30))
def test_a_range_is_the_slice_that_the_rfc_says(first: int, last: int, size: int) -> None:
    data = bytes(range(size))
    if last < first:
        assert byte_range(f"bytes={first}-{last}", size) is None
    elif first >= size:
        with pytest.raises(RangeNotSatisfiable):
            byte_range(f"bytes={first}-{last}", size)
    else:
        found = byte_range(f"bytes={first}-{last}", size)
        assert found is not None
        assert data[slice(*found)] == data[first : last + 1]


# Queries --------------------------------------------------------------------------------------------------------

_names = st.sampled_from([*OPTIONS, "shape", "dtype", "colour", "", "vae "])
_values = st.sampled_from(
    ["", "0", "-1", "1", "1e400", "nan", "inf", "true", "null", "{}", "[", "sd", "png", "١"]
) | st.text(max_size=20)
_PROTOCOL = [
    "shape", "dtype", "output_type", "image_format", "do_scaling", "scaling_factor", "shift_factor", "height", "width",
    "partial_postprocess", "frames", "fps", "seed",
]  # fmt: skip
_queries = st.lists(st.tuples(_names, _values), max_size=6)


@given(_queries)
def test_a_query_is_options_or_a_refusal(query: list[tuple[str, str]]) -> None:
    try:
        found = options_of(MultiDict(query), besides=("shape", "dtype"))
    except InvalidJob as error:
        named = error.field
        assert named is not None
    else:
        assert set(found) <= set(OPTIONS)


@_SHARED
@given(_queries)
def test_a_query_over_http_is_answered(shared: RunningGateway, query: list[tuple[str, str]]) -> None:
    answer = requests.post(f"{shared.url}/v1/decodes", params=query, data=b"x", headers=SAFETENSORS, timeout=30)
    assert answer.status_code in (400, 413, 414, 415, 422), answer.text
    json.loads(answer.content)


@_SHARED
@given(st.lists(st.tuples(st.sampled_from(_PROTOCOL), _values), max_size=8))
def test_a_remote_decode_is_answered(shared: RunningGateway, query: list[tuple[str, str]]) -> None:
    answer = requests.post(f"{shared.url}/decode/sd", params=query, data=b"x", timeout=30)
    assert answer.status_code in (400, 413, 414, 415, 422), answer.text
    assert isinstance(answer.json(), dict)


@_SHARED
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20))
@example("http://[")
@example("http://[::1")
@example("//")
def test_an_origin_is_ours_or_refused(shared: RunningGateway, origin: str) -> None:
    answer = requests.post(f"{shared.url}/v1/decodes/x/cancel", headers={"Origin": origin}, timeout=30)
    assert answer.status_code == 403, answer.text


_words = st.text(st.characters(exclude_categories=()), max_size=5)  # with halves of characters
_options = st.dictionaries(
    st.sampled_from([*OPTIONS, "shape", "dtype"]) | _words,
    st.recursive(_words | st.integers() | st.none() | st.booleans(), lambda inner: st.lists(inner, max_size=3)),
    max_size=4,
)


@_SHARED
@given(st.lists(_options, min_size=1, max_size=3))
@example([{"\ud800": 1}])
@example([{"vae": "\udfff", "job_id": "\ud800"}])
def test_the_options_of_a_batch_are_jobs_or_refused(shared: RunningGateway, jobs: list[dict[str, object]]) -> None:
    latents: list[tuple[str, tuple[str | None, str | bytes]]] = [("latents", ("l", b"x")) for _ in jobs]
    files = [("jobs", (None, json.dumps(jobs))), *latents]
    answer = requests.post(f"{shared.url}/v1/decodes/batch", files=files, timeout=30)
    assert answer.status_code == 200, answer.text
    assert [item["error"]["status"] in (413, 415, 422) for item in answer.json()["items"]] == [True] * len(jobs)


# Tensor headers -------------------------------------------------------------------------------------------------

_dims = st.lists(st.integers(-2, 70) | st.integers(0, 2**70) | st.none() | st.text(max_size=2), max_size=9)
_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "", "f32"]) | st.none() | st.integers(),
        "shape": _dims | st.text(max_size=3),
        "data_offsets": st.lists(st.integers(-5, 5000), max_size=3) | st.none(),
    },
)
_headers = st.dictionaries(
    st.sampled_from(["latents", "other", "__metadata__"]) | st.text(max_size=4), _entries, max_size=3
)


@_SHARED
@given(_headers | st.lists(st.integers()) | st.text(max_size=30), st.binary(max_size=300), st.integers(-3, 3))
def test_a_tensor_file_is_a_job_or_refused(shared: RunningGateway, header: object, data: bytes, off: int) -> None:
    text = json.dumps(header).encode()
    body = struct.pack("<Q", max(0, len(text) + off)) + text + data
    answer = requests.post(f"{shared.url}/v1/decodes?vae=sd", data=body, headers=SAFETENSORS, timeout=30)
    assert answer.status_code in (202, 400, 413, 415, 422), answer.text
    if answer.status_code != 202:
        assert answer.headers["Content-Type"] == "application/problem+json"


@_SHARED
@given(st.binary(max_size=400), st.sampled_from(["x", "boundary", ""]))
def test_a_multipart_body_is_a_job_or_refused(shared: RunningGateway, data: bytes, boundary: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    for path in ("/v1/decodes?vae=sd", "/v1/decodes/batch"):
        framed = b'--x\r\nContent-Disposition: form-data; name="jobs"\r\n\r\n' + data + b"\r\n--x--\r\n"
        for body in (data, framed):
            answer = requests.post(shared.url + path, data=body, headers=headers, timeout=30)
            assert answer.status_code in (400, 413, 415, 422), answer.text
