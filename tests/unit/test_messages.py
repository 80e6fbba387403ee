"""Messages: what is sent arrives, every field counts, a newer version is told apart; states follow the drawing."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_config.decode_result import Artifact, DecodeResult
from broker_config.errors import InvalidOption, UnsupportedMessage
from broker_config.job_status import TRANSITIONS, JobStatus
from broker_config.keys import Priority
from broker_config.latent_geometry import LatentState
from broker_config.messages import SCHEMA_VERSION, BlobRef, DecodeRequest, Kind, Mode, Output, check_job_id
from broker_config.webhooks import JOB_EVENTS, Webhook, WebhookEvent
from tests.support.example_messages import BLOB, REQUEST, wire_of

#: A machine that does much else must not fail a test.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


counts = st.integers(1, 2**40)


seconds = st.floats(0.001, 1e9)


blobs = st.builds(BlobRef, store=texts, name=texts, sha256=texts, size_bytes=counts)


webhooks = st.builds(
    Webhook, url=texts, events=st.lists(st.sampled_from(JOB_EVENTS), unique=True).map(tuple), inline=st.booleans()
)


requests = st.builds(
    DecodeRequest,
    webhook=st.none() | webhooks,
    job_id=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    vae=texts,
    layout=texts,
    latents=blobs,
    shape=st.lists(counts, min_size=1, max_size=6).map(tuple),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    height=counts,
    width=counts,
    batch=counts,
    num_frames=counts,
    fps=seconds,
    output=st.sampled_from(Output),
    mode=st.none() | st.sampled_from(Mode),
    priority=st.sampled_from(Priority),
    timeout_s=seconds,
    start_within_s=st.none() | seconds,
    retention_s=seconds,
    scaling_factor=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    shift_factor=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    metadata=st.dictionaries(texts, texts, max_size=4),
    provenance=st.booleans(),
    allow_tiling=st.booleans(),
    source_job_id=st.none() | texts,
    state=st.none() | st.sampled_from([str(item) for item in LatentState]),
    patch_size=st.none() | st.integers(1, 4096),
    layers=st.none() | st.integers(1, 4096),
    additional_frames=st.none() | st.integers(0, 4096),
    frames_per_call=st.none() | st.integers(1, 4096),
    blended_tiles=st.none() | st.from_regex(r"[1-9][0-9]?x[1-9][0-9]?\+[0-9]{1,2}", fullmatch=True),
    sigma_data=st.none() | st.floats(0.01, 1e6),
    decode_timestep=st.none() | st.floats(0, 1),
    decode_noise_scale=st.none() | st.floats(0, 1),
    seed=st.none() | st.integers(0, 2**64 - 1),
    noise_state=st.none() | st.just("ab-_" * 900),
    vae_class=st.none() | st.just("AutoencoderKL"),
    vae_config=st.none() | st.just("0123456789abcdef"),
    vae_revision=st.none() | st.just("v1.0-rc.2"),
    kind=st.sampled_from(Kind),
)


@unhurried
@given(request=requests)
def test_a_request_arrives_as_it_was_sent(request: DecodeRequest) -> None:
    back = DecodeRequest.from_wire(request.to_wire())
    assert back == request
    assert DecodeRequest.from_wire(request.to_wire().decode()) == request
    for spec in dataclasses.fields(request):
        assert type(getattr(back, spec.name)) is type(getattr(request, spec.name)), spec.name


@unhurried
@given(request=requests)
def test_equal_requests_are_equal_bytes_of_plain_sorted_ascii_json(request: DecodeRequest) -> None:
    wire = request.to_wire()
    assert dataclasses.replace(request, metadata=dict(sorted(request.metadata.items(), reverse=True))).to_wire() == wire
    assert wire.isascii()
    parsed = json.loads(wire)
    assert json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode() == wire
    assert None not in parsed.values()


def test_a_request_looks_like_this() -> None:
    assert json.loads(REQUEST.to_wire()) | {"provenance": True, "allow_tiling": False} == {
        "schema_version": 1,
        "job_id": "j-1",
        "vae": "sd",
        "layout": "unpacked",
        "latents": {"store": "redis", "name": "j-1.in.0123", "sha256": "ab" * 32, "size_bytes": 1096},
        "shape": [2, 4, 8, 12],
        "dtype": "float16",
        "height": 64,
        "width": 96,
        "batch": 2,
        "num_frames": 1,
        "fps": 8.0,
        "output": "png",
        "priority": "normal",
        "timeout_s": 60.0,
        "retention_s": 86400.0,
        "provenance": True,
        "allow_tiling": False,
    }


@unhurried
@given(
    artifacts=st.lists(st.builds(Artifact, blob=blobs, content_type=texts, extension=texts), max_size=3).map(tuple),
    timings_s=st.dictionaries(texts, seconds, max_size=3),
    decoded_by=st.dictionaries(texts, texts | st.booleans() | counts | st.dictionaries(texts, texts), max_size=3),
)
def test_a_result_arrives_as_it_was_sent(
    artifacts: tuple[Artifact, ...], timings_s: dict[str, float], decoded_by: dict[str, Any]
) -> None:
    result = DecodeResult(artifacts=artifacts, timings_s=timings_s, decoded_by=decoded_by)
    assert DecodeResult.from_wire(result.to_wire()) == result


def test_pixels_are_those_of_every_frame_of_every_item() -> None:
    clip = dataclasses.replace(REQUEST, batch=3, num_frames=9, height=32, width=48)
    assert clip.pixels == 3 * 9 * 32 * 48


#: Another value of each field.
OTHERS: dict[str, Any] = {
    "job_id": "j-2",
    "vae": "sdxl",
    "layout": "video_2d",
    "latents": dataclasses.replace(BLOB, sha256="cd" * 32),
    "shape": (2, 4, 12, 8),
    "dtype": "float32",
    "height": 96,
    "width": 64,
    "batch": 1,
    "num_frames": 2,
    "fps": 24.0,
    "output": Output.JPG,
    "mode": Mode.FAST,
    "priority": Priority.HIGH,
    "timeout_s": 61.0,
    "start_within_s": 5.0,
    "retention_s": 60.0,
    "scaling_factor": 0.5,
    "shift_factor": 0.0,
    "metadata": {"seed": "1"},
    "provenance": False,
    "allow_tiling": True,
    "preview": "taesd",
    "source_job_id": "j-0",
    "state": "denormalised",
    "patch_size": 1,
    "layers": 3,
    "additional_frames": 1,
    "frames_per_call": 14,
    "blended_tiles": "2x3+1",
    "sigma_data": 0.5,
    "decode_timestep": 0.05,
    "decode_noise_scale": 0.025,
    "seed": 42,
    "noise_state": "ab-_" * 900,
    "vae_class": "AutoencoderTiny",
    "vae_config": "0123456789abcdef",
    "vae_revision": "main",
    "webhook": Webhook(url="https://hooks.example/done", events=(WebhookEvent.FAILED,), inline=True),
    "kind": Kind.ENCODE,
    "schema_version": SCHEMA_VERSION + 1,
}


def test_no_field_was_forgotten_here() -> None:
    assert set(OTHERS) >= {spec.name for spec in dataclasses.fields(DecodeRequest)}


@pytest.mark.parametrize("name", OTHERS)
def test_the_digest_changes_with_each_field(name: str) -> None:
    changed = dataclasses.replace(REQUEST, **{name: OTHERS[name]})
    assert changed.payload_hash != REQUEST.payload_hash
    assert len(changed.payload_hash) == 64


@unhurried
@given(request=requests)
def test_a_replay_has_the_same_digest(request: DecodeRequest) -> None:
    assert DecodeRequest.from_wire(request.to_wire()).payload_hash == request.payload_hash


@pytest.mark.parametrize(
    "name", ["vae", "layout", "shape", "dtype", "height", "width", "num_frames", "scaling_factor", "mode"]
)
def test_jobs_that_decode_differently_are_in_different_buckets(name: str) -> None:
    assert dataclasses.replace(REQUEST, **{name: OTHERS[name]}).bucket != REQUEST.bucket


def test_outputs_that_take_different_ways_off_the_device_are_in_different_buckets() -> None:
    buckets = {output: dataclasses.replace(REQUEST, output=output).bucket for output in Output}
    assert len({buckets[Output.PNG], buckets[Output.TENSOR], buckets[Output.MP4]}) == 3
    assert buckets[Output.PNG] == buckets[Output.JPG] == buckets[Output.WEBP] == buckets[Output.UINT8]


@pytest.mark.parametrize(
    "change",
    [
        {"job_id": "j-2"},
        {"batch": 1, "shape": (1, 4, 8, 12)},
        {"metadata": {"seed": "1"}},
        {"priority": Priority.HIGH},
        {"retention_s": 60.0},
        {"provenance": False},
    ],
)
def test_jobs_that_decode_alike_are_in_one_bucket(change: dict[str, Any]) -> None:
    assert dataclasses.replace(REQUEST, **change).bucket == REQUEST.bucket


@pytest.mark.parametrize("job_id", ["a", "A-b_9", "0" * 64, "0198f3f2-7d9e-7cc3-9c3a-2f4b5c6d7e8f"])
def test_an_id_of_letters_digits_and_dashes_is_taken(job_id: str) -> None:
    assert check_job_id(job_id) == job_id


@pytest.mark.parametrize("job_id", ["", "a" * 65, "a b", "a:b", "a.b", "a/b", "ä", "a\n", "\0", "a{b}"])
def test_any_other_id_is_refused(job_id: str) -> None:
    with pytest.raises(InvalidOption, match="1 to 64 characters") as refusal:
        check_job_id(job_id)
    assert refusal.value.field == "job_id"


#: The drawing of DESIGN.md, "States", arrow by arrow, and two that go past `processing`: a start deadline that passes
#: while the job waits, and an attempt that was cut off, whose job went back to the queue, and that completes after all.
ARROWS = {
    ("queued", "processing"),
    ("queued", "canceled"),
    ("processing", "succeeded"),
    ("processing", "failed"),
    ("processing", "canceled"),
    ("processing", "queued"),
    ("succeeded", "expired"),
    ("failed", "expired"),
    ("canceled", "expired"),
    ("queued", "failed"),
    ("queued", "succeeded"),
}


def test_the_transitions_are_the_arrows_of_the_drawing() -> None:
    assert {(str(start), str(end)) for start, ends in TRANSITIONS.items() for end in ends} == ARROWS
    assert set(TRANSITIONS) == set(JobStatus)


def test_a_job_has_ended_in_every_state_but_two() -> None:
    assert [str(status) for status in JobStatus if not status.is_terminal] == ["queued", "processing"]


def test_nothing_leaves_an_end_but_to_be_forgotten() -> None:
    for status in JobStatus:
        if status.is_terminal:
            assert TRANSITIONS[status] <= {JobStatus.EXPIRED}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", "sideways"),
        ("state", 1),
        ("kind", "delete"),
        ("patch_size", 0),
        ("patch_size", 2.0),
        ("patch_size", True),
        ("patch_size", 4097),
        ("layers", -1),
        ("additional_frames", -1),
        ("frames_per_call", 0),
        ("blended_tiles", "0x3+1"),
        ("blended_tiles", "2x3"),
        ("blended_tiles", 4),
        ("sigma_data", 0),
        ("sigma_data", "0.5"),
        ("sigma_data", float("inf")),
        ("decode_timestep", -0.1),
        ("decode_timestep", 1.5),
        ("decode_noise_scale", float("nan")),
        ("seed", -1),
        ("seed", 2**64),
        ("noise_state", "short"),
        ("noise_state", "+" * 2000),
        ("vae_class", "os.system"),
        ("vae_config", "0123"),
        ("vae_revision", "../main"),
    ],
)
def test_a_fact_that_no_pipeline_has_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedMessage, match="cannot be read"):
        DecodeRequest.from_wire(wire_of(**{name: value}))


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({}, 1),
        ({"layout": "packed"}, 1),
        ({"layout": "video_2d"}, 1),
        ({"layout": "packed_frame"}, 2),
        ({"state": "denormalised"}, 2),
        ({"seed": 0}, 2),
        ({"additional_frames": 0}, 2),
        ({"kind": Kind.ENCODE}, 2),
    ],
)
def test_a_message_asks_for_no_newer_reader_than_it_needs(changes: dict[str, Any], version: int) -> None:
    assert dataclasses.replace(REQUEST, **changes).needed_version == version


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "denormalised"},
        {"patch_size": 1},
        {"additional_frames": 2},
        {"sigma_data": 0.5},
        {"vae_config": "0123456789abcdef"},
        {"decode_timestep": 0.05, "seed": 1},
        {"kind": Kind.ENCODE},
    ],
)
def test_jobs_that_differ_in_a_fact_never_share_a_batch(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(REQUEST, **changes).bucket != REQUEST.bucket


def test_jobs_that_draw_noise_are_decoded_alone() -> None:
    noisy = dataclasses.replace(REQUEST, decode_timestep=0.05, seed=1)
    assert noisy.bucket != dataclasses.replace(noisy, job_id="j-2").bucket
    assert REQUEST.bucket == dataclasses.replace(REQUEST, job_id="j-2").bucket
