"""Builds a run's report/: report.html (self-contained), report.md, figures/, tables/.

Reads files only. Parts that a run lacks (images, a teacher, geometry) are omitted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from evals.report import examples, figures, geometry, tables
from evals.report.markdown import markdown
from evals.report.page import Context, add_drawings, add_figure, environment, rows_of
from evals.report.verdict import full_name, verdict
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.training import COLUMNS
from vlopd.digests import digest_files
from vlopd.files import read_json, whole_folder
from vlopd.run.folder import RunFolder
from vlopd.run.stage import Stage, stage


def build_report(run: RunFolder, config: ExperimentConfig) -> Path:
    """Writes RUN/report/ unless it is up to date; returns the path of report.html.

    Raises RunError where run.json is missing or a file of the run was changed.
    """
    for artifact in run.checksums.artifacts():
        if artifact.split("/")[0] not in ("report", "compare"):
            run.checksums.check(artifact, whole=False)
    with stage(run, "report", derived=True) as its:
        if its.is_due(lambda _: _report_inputs(run)):
            _write_report(its, config)
    return run.report / "report.html"


def _write_report(its: Stage, config: ExperimentConfig) -> None:
    run = its.run
    compared: Context = read_json(run.compare) if run.compare.exists() else {}
    sentences = verdict(compared)
    if "arms" not in compared:
        compared = {"tasks": {}, "arms": {}}
    records, roles = tables.arm_records(run, config), config.roles.of
    shown = [arm for arm in records if roles[arm] in ("full", "subnetwork")]
    data = {
        "arms": tables.scores(compared, records),
        "contrasts": tables.contrasts(compared),
        "kinds": tables.groups(compared),
        "training": tables.training(run, config),
        "seeds": tables.seeds(compared),
        "pass_at": tables.pass_at(compared),
        "held_out": tables.held_out(run, config),
        "masks": tables.masks(run, config),
        "identity": tables.identity(records),
    }
    tidy, data["geometry"] = tables.geometry(run, config)
    data["probes"], data["alignment"] = tables.vision(run, records)
    drawn: dict[str, str] = {}
    context: Context = {
        "run": run.root.resolve().name,
        "config": config,
        "teachers": _teachers_of(config),
        "config_json": json.dumps(config.model_dump(mode="json"), indent=1),
        "record": read_json(run.root / "run.json"),
        "records": records,
        "compared": compared,
        "verdict": sentences,
        "full": full_name(compared["arms"]),
        "tasks": [_task_context(name, compared, data, drawn) for name in compared["tasks"]],
        "questions": [
            question
            for name, entry in compared["tasks"].items()
            for question in examples.questions(run, name, entry)
        ],
        "training": _training_context(data["training"]),
        "own_metrics": [
            name for name in data["training"] if name == "reward" or name not in (*COLUMNS, "arm")
        ],
        "curves": _training_curves(data["training"], roles, drawn),
        "held_out": rows_of(data["held_out"]),
        "probes": rows_of(data["probes"]),
        "alignment": rows_of(data["alignment"]),
        "masks": rows_of(data["masks"]),
        "identity": rows_of(data["identity"]),
        "geometry": _geometry_context(run, tidy, data["geometry"], drawn),
        "overlap": _overlap_context(run, drawn) if len(config.geometry.arms) > 1 else [],
        "generations": examples.generations(run, shown),
        "figures": drawn,
    }
    with whole_folder(run.report) as folder:
        (folder / "figures").mkdir()
        (folder / "tables").mkdir()
        for name, svg in drawn.items():
            (folder / "figures" / f"{name}.svg").write_text(figures.standalone(svg))
        for name, table in data.items():
            if not table.empty:
                table.to_csv(folder / "tables" / f"{name}.csv", index=False)
        template = environment().get_template("report.html.j2")
        (folder / "report.html").write_text(template.render(context))
        words = template.render({**context, "questions": [], "generations": []})
        (folder / "report.md").write_text(markdown(words))
    its.finish({}, [path for path in run.report.rglob("*") if path.is_file()])


def _report_inputs(run: RunFolder) -> dict[str, str]:
    """The inputs of the report as digests, including the report's code."""
    parts = (
        "run.json",
        "compare.json",
        "arms/*/*.json*",
        "evals/*/tokens*.json*",
        "evals/vision.json",
        "masks/*.json",
        "geometry/*/*.json",
        "geometry/*.csv",
    )
    paths = [path for part in parts for path in run.root.glob(part)]
    shown = {str(path.relative_to(run.root)): digest_files([path]) for path in sorted(paths)}
    here = Path(__file__).parent
    return {**shown, "report": digest_files([*here.glob("*.py"), *here.glob("*.j2")])}


def _task_context(
    task: str, compared: Context, data: Mapping[str, pd.DataFrame], drawn: dict[str, str]
) -> Context:
    """Template variables of one task; adds its figures to `drawn`."""
    entry = compared["tasks"][task]
    own = {name: table[table.task == task] for name, table in data.items() if "task" in table}
    own = {name: own.get(name, pd.DataFrame()) for name in data}
    rows = own["arms"]
    chance = (entry["chance"] or {}).get("all")
    slug = "".join(c if c.isalnum() else "-" for c in task)
    share = f"{100 * compared['confidence']:g} % interval"
    scores = figures.dots(rows, chance, f"{entry['metric']} (%), {share}")
    add_figure(drawn, f"scores-{slug}", scores)
    differences = rows[rows.role != "full"].dropna(subset=["difference_mean"])
    if not differences.empty:
        names = {f"difference_{key}": key for key in ("mean", "low", "high")}
        plotted = differences[["arm", "role", *names]].rename(columns=names)
        full = full_name(compared["arms"])
        forest = figures.forest(plotted, f"difference to {full} (percentage points), {share}")
        add_figure(drawn, f"differences-{slug}", forest)
    _draw_density(rows, slug, f"{entry['metric']} (%)", drawn)
    return {
        "name": task,
        "slug": slug,
        "chance": chance,
        "entry": entry,
        "rows": rows_of(rows),
        "contrasts": rows_of(own["contrasts"]),
        "kinds": _pivot(own["kinds"], lambda row: f"{row['kind']}\nn = {row['n']}"),
        "seeds": rows_of(own["seeds"]),
        "passes": _pivot(own["pass_at"], lambda row: row["metric"]),
        "non_inferior": [
            {"arm": c["a"], **c["non_inferiority"]}
            for c in entry["contrasts"]
            if "non_inferiority" in c
        ],
        "no_answer": [
            (arm, its["extraction_failure_fraction"])
            for arm, its in entry["arms"].items()
            if (its["extraction_failure_fraction"] or 0) > 0.01
        ],
    }


def _draw_density(rows: pd.DataFrame, slug: str, label: str, drawn: dict[str, str]) -> None:
    """Draws score against density, if masked arms have several densities."""
    masked = rows[rows.role.isin(("subnetwork", "control", "transplant")) & (rows.density > 0)]
    if masked.density.round(6).nunique() < 2:
        return
    edges = rows[rows.role.isin(("full", "base", "teacher"))]
    lines = dict(zip(edges.arm, edges["mean"], strict=True))
    add_figure(drawn, f"density-{slug}", figures.against_density(masked, lines, label))


def _pivot(table: pd.DataFrame, head: Callable[[Context], str]) -> Context | None:
    """Pivots a tidy table: one row per arm, one column per row of an arm, titled by `head`."""
    if table.empty:
        return None
    rows = [(arm, rows_of(part)) for arm, part in table.groupby("arm", sort=False)]
    return {"columns": ["Arm", *map(head, rows[0][1])], "rows": rows}


CURVES = {
    "kl": ("KL to the teacher", "KL(student || teacher), nats/token"),
    "reward": ("Reward", "mean reward of the student's samples"),
    "loss": ("Loss", "training loss"),
}
"""Quantities for the training curves; the first that has values is drawn."""


def _training_context(training: pd.DataFrame) -> list[Context]:
    """The end of each arm's training: means over the last tenth of its steps."""
    if training.empty:
        return []
    ends = []
    for arm, part in training.groupby("arm", sort=False):
        last = part.tail(max(1, len(part) // 10)).mean(numeric_only=True)
        seconds = float(part["seconds"].sum()) if "seconds" in part else None
        known = {"kl": None, **last.dropna().to_dict()}
        ends.append({**known, "arm": arm, "steps": len(part), "seconds": seconds})
    return ends


def _training_curves(
    training: pd.DataFrame, roles: Mapping[str, str], drawn: dict[str, str]
) -> Context | None:
    """Draws the training curves; returns their title and value label."""
    for value, (title, label) in CURVES.items():
        if value in training and training[value].notna().any():
            known = training.dropna(subset=[value])
            add_figure(drawn, "training", figures.curves(known, roles, value, label))
            return {"title": title, "label": label}
    return None


def _geometry_context(
    run: RunFolder, tidy: pd.DataFrame, summary: pd.DataFrame, drawn: dict[str, str]
) -> list[Context]:
    """Per arm: the summary with nulls, what was not measured, and figures."""
    if summary.empty:
        return []
    found = []
    for arm, part in summary.groupby("arm", sort=False):
        drawings = geometry.draw(mine := tidy[tidy.arm == arm])
        if (path := run.geometry(str(arm)) / "trajectory.csv").exists():
            drawings |= geometry.draw_trajectory(pd.read_csv(path))
        found.append(
            {
                "arm": arm,
                "rows": rows_of(part),
                "left_out": geometry.left_out(run.geometry(str(arm))),
                "reasons": geometry.unmeasured(mine),
                "figures": add_drawings(drawn, f"geometry-{arm}", drawings),
            }
        )
    return found


def _overlap_context(run: RunFolder, drawn: dict[str, str]) -> list[tuple[str, str]]:
    """(figure name, caption) of the overlap of arms, if there is one."""
    path = run.root / "geometry" / "overlap.csv"
    found = geometry.draw_overlap(pd.read_csv(path)) if path.exists() else {}
    return add_drawings(drawn, "geometry", found)


def _teachers_of(config: ExperimentConfig) -> str:
    """The teachers by name and model, or `no teacher`."""
    if config.teacher is None:
        return "no teacher"
    names = [f"{name} {about.model}" for name, about in config.teachers.items()]
    return ", ".join(names) + ("" if len(names) == 1 else f" ({config.teacher.type})")
