"""The object of a job, as the gateway and webhooks show it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from broker_config.job_document import Moment, Schema


class Shown(Schema):
    at: Moment
    later: Moment | None = None


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05.000Z"),
        (datetime(2026, 1, 2, 3, 4, 5, 120_000, tzinfo=UTC), "2026-01-02T03:04:05.120Z"),
        (datetime(2026, 1, 2, 4, 4, 5, tzinfo=timezone(timedelta(hours=1))), "2026-01-02T03:04:05.000Z"),
    ],
)
def test_times_have_milliseconds_even_where_there_are_none(at: datetime, text: str) -> None:
    assert Shown(at=at).model_dump(mode="json") == {"at": text, "later": None}


def test_the_schema_of_a_time_is_that_of_rfc_3339() -> None:
    properties = Shown.model_json_schema(mode="serialization")["properties"]
    assert (properties["at"]["type"], properties["at"]["format"]) == ("string", "date-time")
