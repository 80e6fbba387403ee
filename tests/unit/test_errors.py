"""The error tree: drawn as it is, every class with a code of its own and a sentence of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from broker_config import errors
from broker_config.errors import LatentqError, walk

CLASSES = {cls.__name__: cls for cls in walk()}
LEAVES = [cls for cls in CLASSES.values() if not cls.__subclasses__()]
#: Codes are on the wire and in users' programs: one that is here must never change.
CODES = {
    "broker_binary_missing": "BrokerBinaryMissing",
    "broker_not_running": "BrokerNotRunning",
    "broker_refuses_writes": "BrokerRefusesWrites",
    "broker_unreachable": "BrokerUnreachable",
    "broker_unsupported": "BrokerUnsupported",
    "catalog_invalid": "CatalogInvalid",
    "queue_full": "QueueFull",
    "spool_unavailable": "SpoolUnavailable",
    "spool_file_damaged": "SpoolFileDamaged",
    "job_spooled": "JobSpooled",
    "unknown_vae": "UnknownVae",
    "unknown_layout": "UnknownLayout",
    "invalid_option": "InvalidOption",
    "prompt_row_invalid": "InvalidRow",
    "latents_rank": "InvalidRank",
    "latents_channels": "InvalidChannels",
    "latents_dtype": "InvalidDtype",
    "latents_size": "InvalidSize",
    "latents_not_finite": "LatentsNotFinite",
    "pixel_limit_exceeded": "PixelLimitExceeded",
    "latents_too_large": "LatentsTooLarge",
    "tensor_file_not_safetensors": "NotSafetensors",
    "tensor_file_truncated": "TensorFileTruncated",
    "tensor_file_oversized": "TensorFileOversized",
    "job_not_found": "JobNotFound",
    "job_conflict": "JobConflict",
    "job_not_finished": "JobNotFinished",
    "wait_timeout": "WaitTimeout",
    "job_failed": "JobFailed",
    "job_canceled": "JobCanceled",
    "result_expired": "ResultExpired",
    "wrong_output": "WrongOutput",
    "blob_missing": "BlobMissing",
    "blob_corrupt": "BlobCorrupt",
    "weights_missing": "WeightsMissing",
    "weights_mismatch": "WeightsMismatch",
    "decode_failed": "DecodeFailed",
    "output_not_finite": "NonFiniteOutput",
    "out_of_memory": "OutOfMemory",
    "encode_failed": "EncodeFailed",
    "unsupported_message": "UnsupportedMessage",
    "start_deadline_passed": "StartDeadlinePassed",
    "job_timed_out": "JobTimedOut",
    "worker_crashed": "WorkerCrashed",
    "denoise_failed": "DenoiseFailed",
    "bad_request": "BadRequest",
    "route_not_found": "RouteNotFound",
    "method_not_allowed": "MethodNotAllowed",
    "media_type_unsupported": "MediaTypeUnsupported",
    "range_not_satisfiable": "RangeNotSatisfiable",
    "not_authenticated": "NotAuthenticated",
    "not_allowed": "NotAllowed",
    "wrong_host": "WrongHost",
    "length_required": "LengthRequired",
    "body_too_large": "BodyTooLarge",
    "query_too_long": "QueryTooLong",
    "upload_too_slow": "UploadTooSlow",
    "rate_limited": "RateLimited",
    "quota_exceeded": "QuotaExceeded",
    "gateway_busy": "GatewayBusy",
    "internal_error": "InternalError",
}


def drawn() -> Iterator[tuple[str, str | None]]:
    """(class, the class it hangs on) of the drawing; words that are no class name are descriptions."""
    assert errors.__doc__ is not None
    drawing = errors.__doc__.split("::\n", 1)[1]
    above: list[str] = []
    for line in drawing.splitlines():
        branch = re.match(r"    ([│├└─ ]*)(LatentqError|(?<=── )[A-Z].*)$", line)
        if branch is None:
            continue
        depth = len(branch[1]) // 4
        siblings, _, rest = branch[2].partition("  ")
        names = re.findall(r"[A-Z]\w+", siblings)
        del above[depth:]
        for name in names:
            yield name, above[-1] if above else None
        above.append(names[-1])
        if rest and all(name in CLASSES for name in re.split(r" · ", rest.strip())):
            for name in rest.strip().split(" · "):
                yield name, names[-1]


def test_the_drawing_has_every_class_once_where_it_hangs() -> None:
    tree = list(drawn())
    assert sorted(name for name, _ in tree) == sorted(CLASSES)
    for name, parent in tree:
        if parent is not None:
            assert issubclass(CLASSES[name], CLASSES[parent]), f"{name} is drawn under {parent}"


def test_every_class_has_a_code_that_no_other_has() -> None:
    codes = [cls.code for cls in CLASSES.values()]
    assert len(codes) == len(set(codes))
    for cls in CLASSES.values():
        assert "code" in vars(cls), f"{cls.__name__} has the code of its base"
        assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", cls.code)


@pytest.mark.parametrize("code", CODES)
def test_a_published_code_still_means_the_same_error(code: str) -> None:
    assert CLASSES[CODES[code]].code == code


@pytest.mark.parametrize("cls", CLASSES.values(), ids=CLASSES)
def test_the_docstring_is_the_default_message(cls: type[LatentqError]) -> None:
    assert "__doc__" in vars(cls)
    assert cls.__doc__ is not None
    first = cls.__doc__.strip().splitlines()[0]
    more: dict[str, Any] = {"retry_after_s": 1.0} if issubclass(cls, errors.QueueFull | errors.TryLater) else {}
    made = cls(**more)
    assert made.message == str(made) == first
    assert first.endswith(".")
    assert cls("another sentence", **more).message == "another sentence"


def test_what_goes_on_the_wire_is_json_with_code_message_and_whether_to_try_again() -> None:
    plain = errors.UnknownVae("no VAE 'x'", field="vae", job_id="j-1")
    assert json.loads(json.dumps(plain.to_wire())) == {
        "code": "unknown_vae",
        "message": "no VAE 'x'",
        "retryable": False,
        "field": "vae",
        "job_id": "j-1",
    }
    assert errors.BrokerUnreachable("away").to_wire() == {
        "code": "broker_unreachable",
        "message": "away",
        "retryable": True,
    }


def test_what_is_refused_at_the_door_is_a_value_error_and_not_worth_trying_again() -> None:
    refusals = list(walk(errors.InvalidJob))
    assert len(refusals) >= 14
    for cls in refusals:
        assert issubclass(cls, ValueError)
        assert not cls.retryable


def test_a_broker_that_is_away_or_full_is_worth_trying_again() -> None:
    assert all(cls.retryable for cls in walk(errors.BrokerError))


@pytest.mark.parametrize(
    ("cls", "retryable"),
    [
        (errors.WeightsMissing, False),
        (errors.WeightsMismatch, False),
        (errors.NonFiniteOutput, False),
        (errors.UnsupportedMessage, False),
        (errors.StartDeadlinePassed, False),
        (errors.WorkerCrashed, False),
        (errors.DecodeFailed, True),
        (errors.OutOfMemory, True),
        (errors.EncodeFailed, True),
        (errors.JobTimedOut, True),
        (errors.WaitTimeout, True),
        (errors.JobNotFinished, True),
        (errors.BrokerNotRunning, True),
        (errors.JobConflict, False),
        (errors.JobFailed, False),
        (errors.ResultExpired, False),
        (errors.BlobCorrupt, False),
    ],
)
def test_whether_the_same_call_can_succeed_later(cls: type[LatentqError], retryable: bool) -> None:
    assert cls.retryable is retryable


def test_a_wait_that_ran_out_is_pythons_timeout_too() -> None:
    assert issubclass(errors.WaitTimeout, TimeoutError)


def test_a_full_queue_says_when_to_come_back_and_a_failed_job_why_it_failed() -> None:
    assert errors.QueueFull("full", retry_after_s=2.5).retry_after_s == 2.5
    assert errors.JobFailed("failed", error_code="decode_failed").error_code == "decode_failed"
