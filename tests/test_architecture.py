"""The house's rules that a reader should be able to rely on."""

import ast
import graphlib
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("vlopd/**/*.py"), *ROOT.glob("evals/**/*.py")])

GROUND = {
    "__init__", "__main__", "bits", "digests", "distributed", "errors", "files", "interrupts", "loop", "pipeline",
    "plugins", "progress", "seeding", "trust", "types",
}  # fmt: skip
"""The doors of the ground floor: the loop, the pipeline, and what every room may use."""

RANK = {
    "vlopd.errors": 0, "vlopd.types": 0, "vlopd.seeding": 0, "vlopd.bits": 0, "vlopd.progress": 0, "vlopd.trust": 0,
    "vlopd.digests": 1, "vlopd.files": 1, "vlopd.distributed": 1, "vlopd.interrupts": 1, "vlopd.plugins": 1,
    "vlopd.config": 2,
    "vlopd.models": 3, "vlopd.data": 3,
    "vlopd.weights": 4, "vlopd.grading": 4, "vlopd.engines": 4,
    "vlopd.masks": 5, "vlopd.train": 5,
    "vlopd.update_geometry": 6, "vlopd.loop": 6, "vlopd.serve": 6,
    "vlopd.run": 7,
    "vlopd.preflight": 8,
    "evals": 9,
    "vlopd.pipeline": 10,
    "vlopd.api": 11,
    "vlopd.cli": 12,
    "vlopd.__main__": 13,
}  # fmt: skip
"""A room may import rooms of a lower rank, or itself."""


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "evals":
        return "evals"
    return ".".join(parts[:2]) if parts[0] == "vlopd" and len(parts) > 1 else None


def name_of(path: Path) -> str:
    """vlopd/run/folder.py -> vlopd.run.folder; a package's __init__.py is the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in SOURCES}


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports_of(path: Path) -> set[str]:
    """All modules that are imported anywhere in a file, also within functions and for types alone."""
    found = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found


def test_the_ground_floor_has_a_handful_of_doors():
    """Outside of the rooms lie the loop, the pipeline, and what every room may use; a new file has its room."""
    assert {path.stem for path in (ROOT / "vlopd").glob("*.py")} <= GROUND
    rooms = {f"vlopd.{path.parent.name}" for path in (ROOT / "vlopd").glob("*/__init__.py")}
    assert rooms <= set(RANK)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    """No room imports one that is built on it: config <- models <- weights <- train <- loop <- run <- evals."""
    here = room_of(name_of(path))
    if here is None:
        return
    for module in imports_of(path):
        there = room_of(module)
        if there is not None and there != here:
            assert RANK[there] < RANK[here], f"{path.name} imports {module}"


def test_no_cycles_between_modules():
    """Within rooms, too, no module leads back to itself, whatever way its imports are written."""
    order = graphlib.TopologicalSorter(
        {name: imports_of(path) & (MODULES.keys() - {name}) for name, path in MODULES.items()}
    )
    order.prepare()  # raises CycleError with the cycle


def test_packages_do_not_export_again():
    """A name has one place that it is imported from: no __init__.py imports, but for the front door."""
    for path in SOURCES:
        if path.name == "__init__.py" and name_of(path) != "vlopd":
            assert not imports_of(path), path


def test_training_does_not_know_the_built_in_worlds():
    """A reward or loss that needs a built-in data set would not be one for any other."""
    worlds = {"capitals", "emoji", "reasoning", "shapes", "shapes_choice"}
    for path in (ROOT / "vlopd" / "train").glob("*.py"):
        assert not imports_of(path) & {f"vlopd.data.{world}" for world in worlds}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_attribute_probing_outside_models(path):
    """getattr and hasattr probe for families, which is families.py's business (tests may ask a union's member)."""
    if "models" in path.parts or path.name == "lm.py":
        return
    calls = [node for node in nodes_of(path) if isinstance(node, ast.Call)]
    names = {n.func.id for n in calls if isinstance(n.func, ast.Name)}
    assert not names & {"getattr", "hasattr", "setattr"}


def test_the_report_does_not_import_torch():
    """The report reads files only."""
    for path in (ROOT / "evals" / "report").rglob("*.py"):
        assert not any(m.split(".")[0] in ("torch", "transformers") for m in imports_of(path)), path


def test_only_the_report_makes_sentences():
    """Evaluation and comparison write numbers; the report, which reads their files, puts them into words."""
    for name, path in MODULES.items():
        if name.startswith("evals.") and not name.startswith("evals.report"):
            assert not any(module.startswith("evals.report") for module in imports_of(path)), path


def test_constraints_pin_every_requirement():
    """Each dependency of pyproject.toml has a pinned version in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["docs"]
    names = {re.split(r"[\[<>=]", line)[0].lower().replace("-", "_") for line in wanted}
    pinned = {
        line.split("==")[0].lower().replace("-", "_")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names <= pinned, names - pinned


def test_the_readmes_commands_exist():
    """Every script, config and command that the README names exists."""
    text = (ROOT / "README.md").read_text()
    for path in set(re.findall(r"(?:scripts|configs|docs)/[\w./-]*\w", text)):
        assert (ROOT / path).exists(), path
    cli = "".join(p.read_text() for p in (ROOT / "vlopd" / "cli").glob("*.py"))
    for verb in set(
        re.findall(
            r"vlopd (run|check|retrain|mask|geometry|eval|vision|compare|report|show|verify)\b",
            text,
        )
    ):
        assert (
            any(f'{how}"{verb}")' in cli for how in ("command(", "name=")) or f"def {verb}(" in cli
        )
