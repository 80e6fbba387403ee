"""`python -m benchmarks`: runs every benchmark and prints each ratio beside its bar.

`--quick` runs them all with so little of everything that it takes a few minutes: to see that they run. Its figures go
to a temporary folder.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks import gateway_load, harness, overlap, queue_cost, throughput, webhook_isolation

#: Name → (benchmark, its arguments where quick).
BENCHMARKS: Final[dict[str, tuple[Callable[..., dict[str, Any]], Mapping[str, Any]]]] = {
    "queue_cost": (queue_cost.main, {"jobs": 100, "samples": 20, "many": 1000, "claims": 10}),
    "throughput": (throughput.main, {"rounds": 1}),
    "gateway_load": (gateway_load.main, {"rounds": 1, "load_s": 3.0}),
    "overlap": (overlap.main, {"count": 6}),
    "webhook_isolation": (webhook_isolation.main, {"deliveries": 40, "rounds": 1}),
}
Row = tuple[str, str, str]


def run(name: str, *, quick: bool, results: Path) -> dict[str, Any]:
    """Each benchmark in a fresh process: they pin themselves to a core."""
    main, short = BENCHMARKS[name]
    with multiprocessing.get_context("spawn").Pool(1, initializer=harness.store_in, initargs=(results,)) as pool:
        return pool.apply(main, kwds=dict(short) if quick else {})


def rows_of_queue_cost(found: Mapping[str, Any]) -> list[Row]:
    """The rows of the queue's own cost."""
    noop, late, claim, memory = found["noop_decodes"], found["latency"], found["claim_cost"], found["memory"]
    return [
        ("no-op decodes ÷ stock SimpleWorker", f"{noop['ratio_fast_to_stock']:.2f}", "≥ 3"),
        ("no-op decodes, exact ÷ stock", f"{noop['ratio_exact_to_stock']:.2f}", ""),
        ("no-op decodes ÷ sync HTTP, thread queue", f"{noop['ratio_fast_to_http']:.2f}", ""),
        ("submit → result, minus decode and encode, p50", f"{late['p50_ms']:.1f} ms", "≤ 8 ms"),
        ("the same, p99", f"{late['p99_ms']:.1f} ms", "≤ 30 ms"),
        (f"claim with {claim['queued'][1]:,} queued ÷ with {claim['queued'][0]}", f"{claim['ratio']:.2f}", "≤ 1.5"),
        ("broker bytes for a queued job", f"{memory['bytes_per_queued_job']:.0f}", ""),
        ("broker bytes for a finished job", f"{memory['bytes_per_finished_job']:.0f}", ""),
    ]


def rows_of_throughput(found: Mapping[str, Any]) -> list[Row]:
    """The rows of the queue beside a bare loop."""
    rows: list[Row] = []
    for name, row in found.items():
        rows.append((f"queue ÷ bare loop, {name}", f"{row['ratio_median']:.3f}", "≥ 0.95"))
        rows.append((f"device waits under backlog, {name}", f"{row['device_waiting_median']:.1%}", "≤ 3 %"))
    return rows


def rows_of_gateway_load(found: Mapping[str, Any]) -> list[Row]:
    """The rows of the gateway under load."""
    crowd = found["crowd"]
    crowded = f"gateway: errors with {crowd['slow_clients']} slow clients, {crowd['long_polls']} long-polls"
    return [
        (crowded, str(crowd["error_count"]), "0"),
        ("gateway: GET /v1/decodes/{id} beside them, p99", f"{crowd['look_p99_ms']:.1f} ms", ""),
        ("gateway: longest stall, idle", f"{max(found['stall_idle_ms']):.1f} ms", ""),
        (
            "gateway: longest stall at uploads of 15 MB, above idle",
            f"{found['stall_above_idle_ms']:.1f} ms",
            "≤ 20 ms",
        ),
    ]


def rows_of_overlap(found: Mapping[str, Any]) -> list[Row]:
    """The rows of the prompt farm."""
    rows: list[Row] = []
    for name, row in found.items():
        rows.append((f"farm: wall time ÷ its bound, {name}", f"{row['wall_to_bound']:.3f}", "≤ 1.05"))
        rows.append((f"farm: overlap ratio, {name}", f"{row['overlap_ratio']:.3f}", "≥ 0.95"))
        rows.append((f"farm: in-process ÷ farm, {name}", f"{row['speed_up_over_in_process']:.2f}", ""))
    return rows


def rows_of_webhook_isolation(found: Mapping[str, Any]) -> list[Row]:
    """The row of a receiver that hangs beside others."""
    return [("webhooks/s beside a receiver that hangs ÷ alone", f"{found['ratio_median']:.3f}", "≥ 0.95")]


ROWS: Final[dict[str, Callable[[Mapping[str, Any]], list[Row]]]] = {
    "queue_cost": rows_of_queue_cost,
    "throughput": rows_of_throughput,
    "gateway_load": rows_of_gateway_load,
    "overlap": rows_of_overlap,
    "webhook_isolation": rows_of_webhook_isolation,
}


def main() -> None:
    """Runs what the arguments name; results go to benchmarks/results/, unless quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="repeatable; without it, all")
    parser.add_argument("--quick", action="store_true", help="little of everything; nothing is stored")
    arguments = parser.parse_args()
    table = Table(title="latentq benchmarks", header_style="bold")
    for heading in ("what", "figure", "bar"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory(prefix="latentq-bench-") as folder:
        results = Path(folder) if arguments.quick else harness.RESULTS
        for name in arguments.only or BENCHMARKS:
            for row in ROWS[name](run(name, quick=arguments.quick, results=results)):
                table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
