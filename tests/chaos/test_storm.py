"""A minute of `make chaos`, with a seed."""

from __future__ import annotations

import pytest

from tests.chaos.__main__ import _KILL_POINTS, show
from tests.chaos.storm import Storm
from tests.chaos.storm_plan import REQUEUE_SLACK_S, Plan
from tests.support.processes import ROOT


def test_the_tests_that_list_the_kill_points_are_there() -> None:
    """`make chaos` names them; one that was renamed would be left out of it."""
    for name in _KILL_POINTS:
        path, _, test = name.partition("::")
        assert f"def {test}" in (ROOT / path).read_text(), name


@pytest.mark.timeout(600)
def test_a_storm_loses_doubles_and_leaves_nothing() -> None:
    plan = Plan(seed=20, jobs=150, kills=12, damaged=2, deadly=1, bound_s=280)
    report = Storm(plan, say=print).run()
    show(report, plan)
    assert report.problems == []
    assert report.outcomes == {
        "succeeded": plan.jobs - plan.damaged - plan.deadly + len(report.pickup_s),
        "failed": plan.damaged + plan.deadly + plan.takeovers,
    }
    assert all(took <= plan.lease_s + REQUEUE_SLACK_S for took in report.requeue_s), report.requeue_s
