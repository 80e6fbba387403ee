"""`python -m benchmarks`: runs every benchmark and prints each ratio beside its bar."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import gateway_load, overlap, queue_cost, throughput


def _run(main: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Each benchmark in a fresh process: they pin themselves to a core."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(main)


def main() -> None:
    """Runs everything; results go to benchmarks/results/."""
    costs = _run(queue_cost.main)
    through = _run(throughput.main)
    load = _run(gateway_load.main)
    farm = _run(overlap.main)
    table = Table(title="latentq benchmarks", header_style="bold")
    for heading in ("what", "figure", "bar"):
        table.add_column(heading)
    for name, row in through.items():
        table.add_row(f"queue ÷ bare loop, {name}", f"{row['ratio_median']:.3f}", "≥ 0.95")
        table.add_row(f"device waits under backlog, {name}", f"{row['device_waiting_median']:.1%}", "≤ 3 %")
    noop = costs["noop_decodes"]
    table.add_row("no-op decodes ÷ stock SimpleWorker", f"{noop['ratio_fast_to_stock']:.2f}", "≥ 3")
    table.add_row("no-op decodes, exact ÷ stock", f"{noop['ratio_exact_to_stock']:.2f}", "")
    table.add_row("no-op decodes ÷ sync HTTP, thread queue", f"{noop['ratio_fast_to_http']:.2f}", "")
    late = costs["latency"]
    table.add_row("submit → result, minus decode and encode, p50", f"{late['p50_ms']:.1f} ms", "≤ 8 ms")
    table.add_row("the same, p99", f"{late['p99_ms']:.1f} ms", "≤ 30 ms")
    claim = costs["claim_cost"]
    table.add_row("claim with 100,000 queued ÷ with 10", f"{claim['ratio']:.2f}", "≤ 1.5")
    crowd = load["crowd"]
    table.add_row(
        f"gateway: errors with {crowd['slow_clients']} slow clients, {crowd['long_polls']} long-polls",
        str(crowd["error_count"]),
        "0",
    )
    table.add_row("gateway: GET /v1/decodes/{id} beside them, p99", f"{crowd['look_p99_ms']:.1f} ms", "")
    table.add_row("gateway: longest stall, idle", f"{max(load['stall_idle_ms']):.1f} ms", "")
    above = load["stall_above_idle_ms"]
    table.add_row("gateway: longest stall at uploads of 15 MB, above idle", f"{above:.1f} ms", "≤ 20 ms")
    memory = costs["memory"]
    table.add_row("broker bytes for a queued job", f"{memory['bytes_per_queued_job']:.0f}", "")
    table.add_row("broker bytes for a finished job", f"{memory['bytes_per_finished_job']:.0f}", "")
    for name, row in farm.items():
        table.add_row(f"farm: wall time ÷ its bound, {name}", f"{row['wall_to_bound']:.3f}", "≤ 1.05")
        table.add_row(f"farm: overlap ratio, {name}", f"{row['overlap_ratio']:.3f}", "≥ 0.95")
        table.add_row(f"farm: in-process ÷ farm, {name}", f"{row['speed_up_over_in_process']:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
