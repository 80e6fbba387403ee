"""Writes the generated table of docs/decode-speed.md from what `latentq bench` measured (benchmarks/results).

python -m tools.decode_speed_page          writes it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from worker.bench import SAME, near_plain

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "decode-speed.md"
#: Device type → its figures, where there are any.
RESULTS: Final = {
    "CPU": ROOT / "benchmarks" / "results" / "decode_modes_cpu.json",
    "GPU": ROOT / "benchmarks" / "results" / "decode_modes_cuda.json",
}
_MARKS: Final = ("<!-- figures: written by `python -m tools.decode_speed_page` -->", "<!-- end of figures -->")


def figures() -> str:
    """The tables, one for each machine and commit."""
    parts = []
    for kind, path in RESULTS.items():
        if not path.is_file():
            parts.append(f"**{kind}**: not measured yet.")
            continue
        by_machine: dict[str, list[Mapping[str, Any]]] = {}
        for row in json.loads(path.read_text(encoding="utf-8"))["figures"]:
            on = row["on"]
            machine = f"{on['device']}, {on['threads']} threads, torch {on['versions']['torch']}, {on['at'][:10]}"
            by_machine.setdefault(f"{machine}, commit {on['commit'][:7]}", []).append(row)
        for machine, rows in by_machine.items():
            parts += [f"**{kind}**: {machine}.", "\n".join(_table(rows))]
    return "\n\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    near = any("psnr_db" in row for row in rows)
    lines = [
        "| VAE | size | dtype | mode | seconds | × plain | MiB above weights | × largest activation |"
        + " PSNR against plain, dB |" * near,
        "|---|---|---|---|---|---|---|---|" + "---|" * near,
    ]
    for row in rows:
        plain = next((r for r in rows if r["mode"] == "plain" and all(r[key] == row[key] for key in SAME)), None)
        size = f"{row['side']}²" + (f" × {row['frames']}" if row["frames"] > 1 else "")
        ratio = f"{row['seconds'] / plain['seconds']:.2f}" if plain else ""
        lines.append(
            f"| {row['vae']} | {size} | {row['dtype']} | `{row['mode']}` | {row['seconds']:.2f} | "
            f"{ratio} | {row['peak_bytes'] / 2**20:.0f} | "
            f"{row['peak_bytes'] / row['largest_activation_bytes']:.2f} |" + f" {near_plain(row)} |" * near
        )
    return lines


def page(text: str) -> str:
    """The page with the tables of now."""
    start, end = (text.index(mark) for mark in _MARKS)
    return text[: start + len(_MARKS[0])] + "\n" + figures() + "\n" + text[end:]


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
