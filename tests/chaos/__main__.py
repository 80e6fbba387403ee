"""`python -m tests.chaos`: a long storm; prints counts and times, exits 1 if anything is missing."""

from __future__ import annotations

import argparse
import sys

from tests.chaos.storm import REQUEUE_SLACK_S, Plan, Report, Storm


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
    for problem in report.problems:
        print(f"PROBLEM {problem}")


def main() -> int:
    """Runs the storm that the arguments describe."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bound", type=float, default=1800.0)
    arguments = parser.parse_args()
    plan = Plan(
        seed=arguments.seed, jobs=arguments.jobs, kills=arguments.kills, damaged=10, deadly=5, bound_s=arguments.bound
    )
    report = Storm(plan, say=print).run()
    show(report, plan)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
