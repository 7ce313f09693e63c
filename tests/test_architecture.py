"""The house's rules that a reader should be able to rely on."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("vlopd/**/*.py"), *ROOT.glob("evals/**/*.py")])

RANK = {
    "vlopd.config": 0, "vlopd.types": 0, "vlopd.seeding": 0, "vlopd.bits": 0, "vlopd.digests": 0,
    "vlopd.processes": 1, "vlopd.checkpoint": 1, "vlopd.losses": 1, "vlopd.trainable": 1,
    "vlopd.models": 2, "vlopd.data": 2, "vlopd.log": 2, "vlopd.adapter": 2,
    "vlopd.subspace": 2, "vlopd.context": 3, "vlopd.rollout": 3, "vlopd.vocabulary": 3, "vlopd.delta": 3,
    "vlopd.resources": 3, "vlopd.optimizers": 3, "vlopd.rewards": 3, "vlopd.masks": 4, "vlopd.teacher": 4,
    "vlopd.state": 4, "vlopd.stored": 4, "vlopd.evidence": 4, "vlopd.geometry": 5, "vlopd.pair": 5,
    "vlopd.preflight": 6, "vlopd.sources": 6, "vlopd.diagnostics": 7, "vlopd.distill": 8,
    "vlopd.stages": 9, "vlopd.mask_cli": 10, "vlopd.ready": 10, "evals": 10, "vlopd.cli": 11,
}  # fmt: skip
"""A room may import rooms of a lower rank, or itself."""


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] == "evals":
        return "evals"
    return ".".join(parts[:2]) if parts[0] == "vlopd" and len(parts) > 1 else None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{alias.name}" if node.module == "vlopd" else node.module
                for alias in node.names
            }
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    """No room imports one that is built on it: types <- models <- pair <- distill; evals -> vlopd, never back."""
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if here is None:
        return
    for module in imports_of(path):
        there = room_of(module)
        if there is not None and there != here:
            assert RANK[there] < RANK[here], f"{path.name} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_attribute_probing_outside_models(path):
    """getattr and hasattr probe for families, which is families.py's business (tests may ask a union's member)."""
    if "models" in path.parts or path.name == "lm.py":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    names = {n.func.id for n in calls if isinstance(n.func, ast.Name)}
    assert not names & {"getattr", "hasattr", "setattr"}


def test_the_report_does_not_import_torch():
    """The report reads files only."""
    for path in (ROOT / "evals" / "report").glob("*.py"):
        assert not any(m.split(".")[0] in ("torch", "transformers") for m in imports_of(path)), path


def test_constraints_pin_every_requirement():
    """Each dependency of pyproject.toml has a pinned version in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[\[<>=]", line)[0].lower().replace("-", "_") for line in wanted}
    pinned = {
        line.split("==")[0].lower().replace("-", "_")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    assert names <= pinned, names - pinned


def test_the_readmes_commands_exist():
    """Every script, config and verb that the README names is there."""
    text = (ROOT / "README.md").read_text()
    for path in set(re.findall(r"(?:scripts|configs|docs)/[\w./-]*\w", text)):
        assert (ROOT / path).exists(), path
    cli = (ROOT / "vlopd" / "cli.py").read_text()
    for verb in set(
        re.findall(
            r"vlopd (run|check|distill|retrain|mask|geometry|eval|compare|report|show)\b", text
        )
    ):
        assert (
            any(f'{how}"{verb}")' in cli for how in ("command(", "name=")) or f"def {verb}(" in cli
        )
