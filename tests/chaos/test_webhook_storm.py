"""Half a minute of `make chaos-webhooks`, with a seed."""

from __future__ import annotations

import pytest

from tests.chaos.webhook_storm import Plan, WebhookStorm, show


@pytest.mark.timeout(400)
def test_every_end_of_a_job_reaches_the_receiver_under_one_id_whoever_dies() -> None:
    plan = Plan(seed=7, jobs=80, kills=8, bound_s=180)
    report = WebhookStorm(plan, say=print).run()
    show(report, plan)
    assert report.problems == []
    assert report.outcomes.total() == plan.jobs
    assert set(report.outcomes) == {"succeeded", "failed", "canceled"}
    assert report.refused_by_receiver > 0
