"""The reference pages say what the code says: compared by introspection, and by reading the source as a tree."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import pytest
import typer
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from broker_config import errors, keys
from broker_config.job_status import TRANSITIONS, JobStatus
from broker_config.latent_geometry import FACTS, LatentLayout
from broker_config.messages import Mode, Output
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeEntry
from producer.cli import app
from producer.decode_options import DecodeOptions
from worker.settings import load_worker_settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGES = ("broker_config", "producer", "worker")
#: Everything that can log, and the level its method logs at.
_LEVELS: Final = ("debug", "info", "warning", "error", "critical")

Row = dict[str, str]


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def tables(text: str, first_column: str) -> Iterator[Row]:
    """Rows of every table of a page whose first column is headed so, by heading."""
    headings: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            headings = []
        elif not headings:
            headings = cells
        elif headings[0] == first_column and not set(line) <= set("|-"):
            assert len(cells) == len(headings), line
            yield dict(zip(headings, cells, strict=True))


def code(cell: str) -> str:
    """What stands in backquotes in a cell; empty if nothing does."""
    found = re.search(r"`([^`]*)`", cell)
    return found[1] if found else ""


def by_name(name: str, column: str) -> dict[str, Row]:
    """Rows of a page by what is in backquotes in their first column; none twice, none without a meaning."""
    rows = list(tables(page(name), column))
    names = [code(row[column]) for row in rows]
    assert sorted(names) == sorted(set(names)), f"{name} has a row twice"
    for row in rows:
        meaning = row.get("meaning") or row.get("means") or row.get("what") or row.get("makes") or row.get("is") or ""
        assert meaning.rstrip().endswith("."), f"{name}: {row[column]} has no sentence"
    return dict(zip(names, rows, strict=True))


def sources() -> dict[Path, ast.Module]:
    """Every module of the three packages, parsed."""
    files = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


# Options -------------------------------------------------------------------------------------------------


def test_every_option_of_a_job_is_documented_with_its_default() -> None:
    rows = by_name("options.md", "option")
    fields = {field.name: field for field in dataclasses.fields(DecodeOptions)}
    assert set(rows) == set(fields)
    for name, field in fields.items():
        assert default_of(field) == (code(rows[name]["default"]) or rows[name]["default"]), name


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    return str(field.default_factory()) if field.default_factory is not dataclasses.MISSING else "required"


def test_every_option_is_documented_under_its_name_on_the_command_line() -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group) or hasattr(command, "commands")
    submit = command.commands["submit"]
    flags = {item.name: {*item.opts, *item.secondary_opts} for item in submit.params}
    for name, row in by_name("options.md", "option").items():
        documented = code(row["on the command line"])
        assert documented in flags[name] if name in flags else documented == "", name


def test_redecode_takes_the_options_that_do_not_belong_to_the_latents() -> None:
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group) or hasattr(command, "commands")
    flags = [{item.name: item.opts for item in command.commands[name].params} for name in ("submit", "redecode")]
    of_latents = {"vae", "layout", "state", "height", "width", "num_frames", *FACTS}
    names = {field.name for field in dataclasses.fields(DecodeOptions)} - of_latents
    assert names <= set(flags[1])
    assert not of_latents & set(flags[1])
    assert {name: flags[1][name] for name in names} == {name: flags[0][name] for name in names}


@pytest.mark.parametrize(
    ("name", "column", "kind"),
    [("options.md", "output", Output), ("options.md", "mode", Mode), ("vaes.md", "layout", LatentLayout)],
)
def test_every_choice_of_an_option_is_documented(
    name: str, column: str, kind: type[Output | Mode | LatentLayout]
) -> None:
    assert list(by_name(name, column)) == [str(member) for member in kind]


def test_every_field_of_a_catalogue_entry_is_documented_with_its_default() -> None:
    rows = by_name("vaes.md", "field")
    fields = {name: spec for name, spec in VaeEntry.model_fields.items() if name != "name"}
    assert set(rows) == set(fields)
    for name, spec in fields.items():
        documented = code(rows[name]["default"]) or rows[name]["default"]
        default = "required" if spec.is_required() else "none" if spec.default is None else str(spec.default)
        assert documented == default, name


# Settings ------------------------------------------------------------------------------------------------


def settings_classes() -> dict[str, type[BaseSettings]]:
    """Every settings class in the source, by name; found there, so that none is forgotten here."""
    found = {}
    for path, tree in sources().items():
        for node in ast.walk(tree):
            bases = {ast.unparse(base) for base in node.bases} if isinstance(node, ast.ClassDef) else set()
            if isinstance(node, ast.ClassDef) and bases & {"BaseSettings", "Settings"}:
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                found[node.name] = getattr(importlib.import_module(module), node.name)
    return found


def test_every_setting_is_documented_with_its_variable_and_default() -> None:
    classes = settings_classes()
    assert {"Settings", "WorkerSettings"} <= set(classes)
    rows = by_name("settings.md", "variable")
    expected = {}
    for kind in classes.values():
        prefix = kind.model_config.get("env_prefix", "")
        for name, spec in kind.model_fields.items():
            expected[f"{prefix}{name.upper()}"] = spec
    assert set(rows) == set(expected)
    for name, spec in expected.items():
        documented = rows[name]["default"]
        if spec.default_factory is not None or spec.default is PydanticUndefined:
            assert documented, name
        elif spec.default is None:
            assert documented == "none", name
        else:
            default = str(spec.default).lower() if isinstance(spec.default, bool) else str(spec.default)
            assert code(documented) == default.replace("()", "[]"), name


def test_every_variable_of_the_example_is_a_setting_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    uncommented = re.sub(r"^# (?=[A-Z_]+=)", "", text, flags=re.MULTILINE)
    (tmp_path / ".env").write_text(uncommented)
    monkeypatch.chdir(tmp_path)
    assert load_settings().model_fields_set >= {"redis_url", "catalog", "lease_s", "log_level"}
    assert load_worker_settings().vaes == ("sdxl", "flux")

    compose_only = {"LATENTQ_BROKER_MAXMEMORY", "PIP_EXTRA_INDEX_URL"}
    compose = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    names = set(re.findall(r"^# ([A-Z_]+)=", text, flags=re.MULTILINE))
    assert names - compose_only <= set(by_name("settings.md", "variable"))
    assert all(f"${{{name}:-" in compose for name in compose_only)


# Errors --------------------------------------------------------------------------------------------------


def test_every_error_is_documented_with_class_and_whether_to_try_again() -> None:
    documented = {name: (code(row["class"]), row["retryable"]) for name, row in by_name("errors.md", "code").items()}
    expected = {kind.code: (kind.__name__, "yes" if kind.retryable else "no") for kind in errors.walk()}
    assert documented == expected


def test_every_error_that_can_be_met_says_what_to_do() -> None:
    rows = by_name("errors.md", "code")
    leaves = [kind.code for kind in errors.walk() if not kind.__subclasses__()]
    assert [name for name in leaves if not rows[name]["what to do"].endswith(".")] == []


# Redis keys ----------------------------------------------------------------------------------------------


def template(text: str) -> str:
    """`latentq:job:<id>` without the name of what varies."""
    return re.sub(r"<[^>]*>", "<>", text)


def documented_keys() -> set[str]:
    return {
        template(key) for row in tables(page("redis-keys.md"), "key") for key in re.findall(r"`([^`]*)`", row["key"])
    }


def test_every_key_that_keys_py_makes_is_documented() -> None:
    made = {value for name, value in vars(keys).items() if name.isupper() and isinstance(value, str)}
    for function in vars(keys).values():
        if inspect.isfunction(function) and function.__module__ == keys.__name__:
            made.update(made_by(function))
    used = {key for key in made if key.startswith((keys.PREFIX, keys.RQ_PREFIX))} - {keys.PREFIX, keys.RQ_PREFIX}
    assert used - documented_keys() == set()


def made_by(function: Callable[..., object]) -> set[str]:
    """What a key function makes, with `<>` for its arguments; a registry's kind is one of RQ's four."""
    names = list(inspect.signature(function).parameters)
    kinds = ("wip", "finished", "failed", "canceled") if "kind" in names else ("",)
    answers = (function(*(kind if name == "kind" else "<>" for name in names)) for kind in kinds)
    return {answer for answer in answers if isinstance(answer, str)}


def test_every_key_the_scripts_touch_is_documented() -> None:
    documented = documented_keys()
    for path in sorted((ROOT / "broker_config/scripts").glob("*.lua")):
        text = re.sub(r"--.*", "", path.read_text(encoding="utf-8"))
        for owner, literal, more in re.findall(r"\b(P|RQ) \.\. '([a-z_]+:?)'( \.\.)?", text):
            prefix = keys.PREFIX if owner == "P" else keys.RQ_PREFIX
            key = f"{prefix}{literal}" + ("<>" if more or literal.endswith(":") else "")
            assert any(other == key or other.startswith(f"{key}:") for other in documented), f"{path.name}: {key}"


def test_the_schema_in_keys_py_and_the_page_name_the_same_keys() -> None:
    schema = re.findall(r"^    (latentq:\S+) ", keys.__doc__ or "", flags=re.MULTILINE)
    ours = {key for key in documented_keys() if key.startswith(keys.PREFIX)}
    assert {template(key) for key in schema} == ours


# States --------------------------------------------------------------------------------------------------


def transitions() -> set[tuple[str, str]]:
    return {(str(start), str(end)) for start, ends in TRANSITIONS.items() for end in ends}


def test_the_drawing_shows_every_transition_and_no_other() -> None:
    drawn = re.findall(r"^ +(\w+) --> (\w+): .+$", page("states.md"), flags=re.MULTILINE)
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == transitions()


def test_the_table_has_every_transition_with_who_makes_it_and_by_which_script() -> None:
    rows = list(tables(page("states.md"), "from"))
    assert sorted((code(row["from"]), code(row["to"])) for row in rows) == sorted(transitions())
    scripts = {path.stem for path in (ROOT / "broker_config/scripts").glob("*.lua")}
    for row in rows:
        assert row["who and when"].endswith(".")
        named = set(re.findall(r"`(\w+)`", row["script"]))
        assert named
        assert named <= scripts


def test_every_state_is_documented_and_drawn_from_accepted_to_forgotten() -> None:
    assert list(by_name("states.md", "state")) == [str(status) for status in JobStatus]
    assert "[*] --> queued: submit" in page("states.md")
    assert "expired --> [*]: tombstone" in page("states.md")


# Log lines -----------------------------------------------------------------------------------------------


def logged_actions() -> Mapping[str, set[str]]:
    """Every `action` of a log call in the source, with the levels it is logged at.

    A value that is no literal is looked up among the assignments of its function; one that stays unknown fails.
    """
    actions: dict[str, set[str]] = defaultdict(set)
    for path, tree in sources().items():
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if (value := _action_of(call)) is None:
                continue
            assert isinstance(call.func, ast.Attribute)
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            inside = [node for node in functions if node.lineno <= call.lineno <= (node.end_lineno or 0)]
            names = _strings(value, inside)
            assert names, f"{where}: cannot tell which action this is"
            for name in names:
                actions[name].add(call.func.attr)
    return actions


def _action_of(call: ast.Call) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "action":
                    return value
    return None


def _strings(value: ast.expr, functions: list[ast.FunctionDef | ast.AsyncFunctionDef]) -> set[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return {value.value}
    if isinstance(value, ast.IfExp):
        return _strings(value.body, functions) | _strings(value.orelse, functions)
    if isinstance(value, ast.Name):
        found: set[str] = set()
        for function in functions:
            for node in ast.walk(function):
                targets = node.targets if isinstance(node, ast.Assign) else []
                if any(isinstance(target, ast.Name) and target.id == value.id for target in targets):
                    assert isinstance(node, ast.Assign)
                    found |= _strings(node.value, [])
        return found
    return set()


def test_every_log_action_is_documented_with_its_level() -> None:
    documented = {name: row["level"] for name, row in by_name("logs.md", "action").items()}
    assert documented == {
        name: " ".join(sorted(levels, key=_LEVELS.index)) for name, levels in logged_actions().items()
    }


def test_every_log_line_of_ours_has_an_action() -> None:
    silent = []
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in (*_LEVELS, "exception", "log")
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id in ("logger", "_log", "log", "logging")
                and _action_of(node) is None
            ):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []


# Links ---------------------------------------------------------------------------------------------------


def markdown() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


@pytest.mark.parametrize("path", markdown(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, heading = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)\s#]+)\)", page("README.md")))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"README.md"}
    assert pages - linked == set()


def test_every_page_the_source_refers_to_exists() -> None:
    files = [
        path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".lua", ".toml")
    ]
    missing = [
        f"{path.relative_to(ROOT)} refers to {reference}"
        for path in files
        for reference in re.findall(r"docs/[\w./-]*\w", path.read_text(encoding="utf-8"))
        if not (ROOT / reference).exists() and not list(ROOT.glob(f"{reference}-*.md"))
    ]
    assert missing == []
