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
from tests.parity.families import CASES, OTHERS
from tests.parity.whole_pipelines import REMOTE_VAE_PIPELINES

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
    "AsymmetricAutoencoderKL": "none",
    "ConsistencyDecoderVAE": "none",
    "AutoencoderKLAllegro": "always",
    "AutoencoderKLMiniMaxH3": "default",
    "AutoencoderKLHunyuanVideo": "over time by default",
}


def families() -> str:
    """The table of catalogue entries."""
    catalog = VaeCatalog.load()
    served, whole = _pipelines_by_vae(), whole_pipelines()
    lines = [
        "| family | class | layouts | state | dtype | tiling | pipelines | of them whole | parity test |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in catalog.items():
        pipelines, run = served.get(name, []), whole.get(name, [])
        lines.append(
            f"| `{name}` | {entry.vae_class} | {_layouts(entry)} | {_states(entry)} | {entry.dtype} | "
            f"{_TILING.get(entry.vae_class, 'opt-in')} | {len(pipelines) or '–'} | {len(run) or '–'} | "
            f"{_tests(name)} |"
        )
    return "\n".join(lines)


def whole_pipelines() -> dict[str, list[str]]:
    """Catalogue entry → pipelines that the parity suite builds and calls whole."""
    found: dict[str, list[str]] = {}
    for case in (*CASES.values(), *OTHERS.values()):
        _add(found, case.vae, case.pipeline.rpartition(".")[2])
    for pipeline, name in REMOTE_VAE_PIPELINES.items():
        _add(found, name, pipeline)
    return found


def _add(found: dict[str, list[str]], name: str, pipeline: str) -> None:
    named = found.setdefault(name, [])
    if pipeline not in named:
        named.append(pipeline)


def pipelines() -> str:
    """The pipelines of each family, and those that are not taken."""
    lines = ["| family of | pipelines |", "|---|---|"]
    lines += [f"| `{name}` | {', '.join(sorted(found))} |" for name, found in sorted(_pipelines_by_vae().items())]
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


def _tests(name: str) -> str:
    """The parity tests that have cases of the entry."""
    whole = any(name == case.vae for case in CASES.values())
    remote = name in REMOTE_VAE_PIPELINES.values() and not whole
    more = any(name == case.vae for case in OTHERS.values())
    found = ["test_families"] * whole + ["test_remote_vae_families"] * remote + ["test_other_classes"] * more
    found += [path.stem for path in sorted(PARITY.glob("test_*.py")) if name in _strings(path)]
    return ", ".join(f"`{item}`" for item in dict.fromkeys(found)) or "none"


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
