"""Writes the generated tables of docs/vaes.md: which families there are, and which pipelines they serve.

python -m tools.vae_table          writes them
python -m tools.vae_table --check  says whether they are current, and exits with 1 if not
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Final

from broker_config.vae_catalog import VaeCatalog, VaeEntry
from producer.pipeline_table import EXCEPTED
from producer.pipelines import served_by

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = ROOT / "docs" / "vaes.md"
PARITY: Final = ROOT / "tests" / "parity"
#: Where the tables stand.
_MARKS: Final = ("<!-- families: written by `python -m tools.vae_table` -->", "<!-- end of families -->")
#: Classes whose `enable_tiling` changes nothing or raises, and those that tile unless told otherwise
#: (diffusers models/autoencoders, `_decode` of each).
_TILING: Final = {
    "AutoencoderKLTemporalDecoder": "none",
    "AutoencoderKLCosmos": "none",
    "AutoencoderKLAllegro": "always",
    "AutoencoderKLMiniMaxH3": "default",
    "AutoencoderKLHunyuanVideo": "over time by default",
}


def families() -> str:
    """The table of catalogue entries."""
    catalog = VaeCatalog.load()
    served = _pipelines_by_vae()
    lines = [
        "| family | class | layouts | state | dtype | tiling | pipelines | parity test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in catalog.items():
        pipelines = served.get(name, [])
        lines.append(
            f"| `{name}` | {entry.vae_class} | {_layouts(entry)} | {_states(entry)} | {entry.dtype} | "
            f"{_TILING.get(entry.vae_class, 'opt-in')} | {len(pipelines) or '–'} | {_tests(name, bool(pipelines))} |"
        )
    return "\n".join(lines)


def pipelines() -> str:
    """The pipelines of each family, and those that are not taken."""
    lines = ["| family of | pipelines |", "|---|---|"]
    for name, found in sorted(_pipelines_by_vae().items()):
        lines.append(f"| `{name}` | {', '.join(sorted(found))} |")
    lines += ["", "| not taken | because of its latents |", "|---|---|"]
    lines += [f"| {name} | {reason} |" for name, reason in sorted(EXCEPTED.items())]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as they should be."""
    before, rest = text.split(_MARKS[0], 1)
    _, after = rest.split(_MARKS[1], 1)
    return f"{before}{_MARKS[0]}\n\n{families()}\n\n{pipelines()}\n\n{_MARKS[1]}{after}"


def _pipelines_by_vae() -> dict[str, list[str]]:
    found = {name: served_by(name) for name in VaeCatalog.load()}
    return {name: pipelines for name, pipelines in found.items() if pipelines}


def _layouts(entry: VaeEntry) -> str:
    return ", ".join(f"`{item}`" for item in entry.layouts)


def _states(entry: VaeEntry) -> str:
    states = dict.fromkeys(entry.state_of(item) for item in entry.layouts)
    return ", ".join(f"`{item}`" for item in states)


def _tests(name: str, has_pipelines: bool) -> str:
    """The parity tests whose source names the entry; every entry with a pipeline is in the test of all of them."""
    found = [f"`{path.stem}`" for path in sorted(PARITY.glob("test_*.py")) if name in _strings(path)]
    return ", ".join(dict.fromkeys((["`test_every_pipeline`"] if has_pipelines else []) + found)) or "none"


def _strings(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def main(arguments: list[str]) -> int:
    """Exit status."""
    text = PAGE.read_text(encoding="utf-8")
    current = page(text)
    if "--check" in arguments:
        return int(text != current)
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
