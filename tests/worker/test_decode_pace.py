"""How long a decode may be silent, by what earlier ones took."""

from __future__ import annotations

import math

import pytest

from worker.decode_pace import DecodePace

PX = 512 * 512


def test_where_nothing_was_seen_only_the_timeout_counts() -> None:
    pace = DecodePace()
    assert pace.silence_s("sd", "decode", pixels=PX) == math.inf
    pace.learn("sd", "decode", pixels=PX, seconds=1.0)
    assert pace.silence_s("sdxl", "decode", pixels=PX) == math.inf
    assert pace.silence_s("sd", "encode", pixels=PX) == math.inf


def test_twenty_times_the_slowest_pace_seen_and_a_minute_at_least() -> None:
    pace = DecodePace()
    pace.learn("sd", "decode", pixels=8 * PX, seconds=80.0)  # 10 s for PX
    pace.learn("sd", "decode", pixels=PX, seconds=1.0)
    assert pace.silence_s("sd", "decode", pixels=PX) == pytest.approx(200.0)
    assert pace.silence_s("sd", "decode", pixels=PX // 100) == 60.0


def test_a_decode_larger_than_any_before_may_take_quadratic_time() -> None:
    pace = DecodePace()
    pace.learn("sd", "decode", pixels=PX, seconds=10.0)
    assert pace.silence_s("sd", "decode", pixels=3 * PX) == pytest.approx(20 * 10.0 * 9)


def test_what_a_decode_is_expected_to_take_is_the_least_seen() -> None:
    pace = DecodePace()
    assert pace.expected_s("sd", "decode", pixels=PX) == 0.0
    pace.learn("sd", "decode", pixels=PX, seconds=10.0)  # the first call of all
    pace.learn("sd", "decode", pixels=2 * PX, seconds=4.0)
    assert pace.expected_s("sd", "decode", pixels=3 * PX) == pytest.approx(6.0)
    assert pace.expected_s("sd", "encode", pixels=PX) == 0.0
