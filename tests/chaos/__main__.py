"""`python -m tests.chaos`: kills after each command once, then a long storm; exits 1 if anything is missing."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.chaos.storm import Storm
from tests.chaos.storm_plan import PICKUP_BAR_S, REQUEUE_SLACK_S, Plan, Report
from tests.support.processes import ROOT


def show(report: Report, plan: Plan) -> None:
    """Prints what happened."""
    jobs = sum(report.outcomes.values())
    print(f"seed {plan.seed}: {jobs} jobs in {report.seconds:.0f} s: {dict(report.outcomes)}")
    print(f"SIGKILLs: {dict(report.kills)}; faults on the wire: {dict(report.faults)}")
    print(f"rq info ran {report.rq_info_runs} times; {report.submit_retries} submits were repeated")
    for name, times in (("undisturbed", report.requeue_s), ("broker or janitor died too", report.requeue_disturbed_s)):
        if times:
            middle, longest = sorted(times)[len(times) // 2], max(times)
            print(f"kill → queued again, {name}: median {middle:.1f} s, longest {longest:.1f} s of {len(times)}")
    print(f"(lease {plan.lease_s:.0f} s, bar {plan.lease_s + REQUEUE_SLACK_S:.0f} s)")
    for name, times in (("a fresh job", report.pickup_s), ("a dead worker's job", report.takeover_s)):
        if times:
            middle, longest = sorted(times)[len(times) // 2], max(times)
            print(
                f"queued → running, idle worker, {name}: median {middle:.3f} s, longest {longest:.3f} s of {len(times)}"
            )
    print(f"(bar {PICKUP_BAR_S:.0f} s)")
    for problem in report.problems:
        print(f"PROBLEM {problem}")


#: Tests that kill a process at each of its commands; their names are the list of points.
_KILL_POINTS = (
    "tests/reliability/test_killed_producers.py::"
    "test_a_producer_killed_after_any_of_its_commands_leaves_a_job_or_nothing_that_stays",
    "tests/chaos/test_kill_points.py",
    "tests/chaos/test_courier_kill_points.py",
)


def kill_points() -> int:
    """Kills a producer and a worker at each of their commands, prints the list, returns pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", *_KILL_POINTS]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    """Runs the storm that the arguments describe."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bound", type=float, default=1800.0)
    parser.add_argument("--takeovers", type=int, default=5)
    parser.add_argument("--storm-only", action="store_true", help="leave out the kills at each command")
    arguments = parser.parse_args()
    points = 0 if arguments.storm_only else kill_points()
    plan = Plan(
        seed=arguments.seed,
        jobs=arguments.jobs,
        kills=arguments.kills,
        damaged=10,
        deadly=5,
        takeovers=arguments.takeovers,
        bound_s=arguments.bound,
    )
    report = Storm(plan, say=print).run()
    show(report, plan)
    return 1 if report.problems or points else 0


if __name__ == "__main__":
    sys.exit(main())
