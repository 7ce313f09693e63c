"""Builds a run's report/: report.html (self-contained), report.md, figures/, tables/.

Reads files only. Parts that a run lacks (images, a teacher, geometry) are omitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from evals.report import figures, geometry, tables
from evals.report.additions import additions
from evals.report.examples import collect, training_samples
from evals.report.headline import headline
from evals.report.markdown import markdown
from evals.report.page import Context, add_drawings, add_figure, environment, rows_of
from evals.report.read import read_table
from evals.report.recipe import recipe
from evals.report.sections import EMPTY, render_report, scores_context, slug
from evals.report.tuning import chosen_points, curves, read_sweeps, tuning_context
from evals.report.verdict import verdict
from vlopd.config.experiment import ExperimentConfig
from vlopd.config.training import COLUMNS
from vlopd.digests import digest_files
from vlopd.files import whole_folder
from vlopd.run.folder import RunFolder
from vlopd.run.links import check_links
from vlopd.run.schemas.read import read_record
from vlopd.run.stage import stage

READ = (
    *("run", "arms", "masks", "geometry", "evals", "tokens", "base_kl", "images"),
    *("validation", "sweeps", "compare"),
)
"""Kinds of artifacts that reports show."""


def build_report(run: RunFolder, config: ExperimentConfig, out: Path | None = None) -> Path:
    """Writes RUN/report/ unless it is up to date, or else the folder `out`; returns the path of report.html.

    With `out` the run is only read. Raises RunError where run.json is missing or a file of the run was changed.
    """
    run.checksums.check_finished(*READ)
    check_links(run, config, *READ)
    if out is not None:
        _write_report(run, config, out)
        return out / "report.html"
    with stage(run, "report", derived=True) as its:
        if its.is_due(lambda _: _report_inputs(run)):
            _write_report(run, config, run.report)
            its.finish({}, [path for path in run.report.rglob("*") if path.is_file()])
    return run.report / "report.html"


def _write_report(run: RunFolder, config: ExperimentConfig, out: Path) -> None:
    compared: Context = read_record(run.compare) if run.compare.exists() else {}
    sentences, lines = verdict(compared), headline(compared)
    if "arms" not in compared:
        compared = {"tasks": {}, "arms": {}}
    records, roles = tables.arm_records(run, config), config.roles.of
    shown = [arm for arm in records if roles[arm] in ("full", "subnetwork")]
    held_out = tables.held_out_scores(run, config)
    data = {
        **tables.compared_tables(compared, records),
        "training": tables.training(run, config),
        "held_out": tables.held_out(held_out),
        "masks": tables.masks(run, config),
        "identity": tables.identity(records),
    }
    sweeps = read_sweeps(run, config)
    data["tuning"] = curves(sweeps)
    tidy, data["geometry"] = tables.geometry(run, config)
    data["probes"], data["alignment"] = tables.vision(run, records)
    drawn: dict[str, str] = {}
    about = read_record(run.root / "run.json")
    name, created = run.root.resolve().name, about.get("created", "")[:10]
    found = collect(run, compared)
    context: Context = {
        **EMPTY,
        **scores_context(compared, data, drawn),
        "title": config.title or config.name,
        "subtitle": f"Student {config.student.model}, {_teachers_of(config)}. Run {name}"
        + (f", started {created}." if created else "."),
        "run": name,
        "config": config,
        "config_json": json.dumps(config.model_dump(mode="json"), indent=1),
        "record": about,
        "recipe": recipe(run, config.with_points(chosen_points(config, sweeps)), records),
        "tuning": tuning_context(sweeps, data["tuning"], drawn),
        "records": records,
        "headline": lines,
        "verdict": sentences,
        "additions": additions(run, config, compared, drawn),
        "training": [
            {"kl_to_base": None, "delta_norm": None, **row, **compared["arms"].get(row["arm"], {})}
            for row in _training_context(data["training"])
        ],
        "own_metrics": [
            name for name in data["training"] if name == "reward" or name not in (*COLUMNS, "arm")
        ],
        "curves": _training_curves(data["training"], held_out, roles, drawn),
        "held_out": rows_of(data["held_out"]),
        "probes": rows_of(data["probes"]),
        "alignment": rows_of(data["alignment"]),
        "masks": rows_of(data["masks"]),
        "identity": rows_of(data["identity"]),
        "geometry": _geometry_context(run, tidy, data["geometry"], drawn),
        "overlap": _overlap_context(run, drawn) if len(config.geometry.arms) > 1 else [],
        "generations": training_samples(run, shown),
        "figures": drawn,
    }
    with whole_folder(out) as folder:
        (folder / "figures").mkdir()
        (folder / "tables").mkdir()
        for name, svg in drawn.items():
            (folder / "figures" / f"{name}.svg").write_text(figures.standalone(svg))
        for name, table in data.items():
            if not table.empty:
                table.to_csv(folder / "tables" / f"{name}.csv", index=False)
        (folder / "report.html").write_text(render_report(context, found, folder / "examples"))
        words = environment().get_template("report.html.j2").render({**context, "generations": []})
        (folder / "report.md").write_text(markdown(words))


def _report_inputs(run: RunFolder) -> dict[str, str]:
    """The inputs of the report as digests, including the report's code."""
    parts = (
        "run.json",
        "compare.json",
        "arms/*/*.json*",
        "evals/*/tokens*.json*",
        "evals/*/base_kl.json",
        "evals/vision.json",
        "sweeps/*.json",
        "masks/*.json",
        "geometry/*/*.json",
        "geometry/*.csv",
    )
    paths = [path for part in parts for path in run.root.glob(part)]
    shown = {str(path.relative_to(run.root)): digest_files([path]) for path in sorted(paths)}
    here = Path(__file__).parent
    return {**shown, "report": digest_files([*here.glob("*.py"), *here.glob("*.j2")])}


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


CURVES = {
    "kl": ("KL(student || teacher), nats/token", "KL, nats/token"),
    "loss": ("Training loss", "loss"),
    "student_entropy": ("Student's entropy, nats/token", "entropy, nats/token"),
    "reward": ("Mean reward", "reward"),
    "mean_completion_tokens": ("Mean tokens of a completion", "tokens"),
    "grad_norm": ("Gradient norm before clipping", "gradient norm"),
}
"""Columns of metrics.jsonl that are drawn, with title and label; the loss only where there is no KL."""


def _training_curves(
    training: pd.DataFrame,
    held_out: pd.DataFrame,
    roles: Mapping[str, str],
    drawn: dict[str, str],
) -> list[Context]:
    """Draws held-out scores and the training curves that have values; returns their names, titles and notes."""
    found = []
    for task, part in held_out.groupby("task", sort=False) if not held_out.empty else ():
        name, metric = f"held-out-{slug(str(task))}", part.metric.iloc[0]
        figure = figures.curves(
            part.assign(score=100 * part.score), roles, "score", f"{metric} (%)", every=False
        )
        add_figure(drawn, name, figure)
        found.append({"name": name, "title": f"Held-out {task}", "note": f": {metric}"})
    known = [v for v in CURVES if v in training and training[v].notna().any()]
    if "kl" in known:
        known.remove("loss")
    for value in known:
        title, label = CURVES[value]
        name = f"training-{value.replace('_', '-')}"
        rows = training.dropna(subset=[value])
        add_figure(drawn, name, figures.curves(rows, roles, value, label))
        note = ". Faint: every step; strong: running mean"
        found.append({"name": name, "title": title, "note": note})
    return found


def _geometry_context(
    run: RunFolder, tidy: pd.DataFrame, summary: pd.DataFrame, drawn: dict[str, str]
) -> list[Context]:
    """Per arm: the summary with nulls, what was not measured, and figures."""
    if summary.empty:
        return []
    found = []
    for arm, part in summary.groupby("arm", sort=False):
        about = read_record(run.geometry(str(arm)) / "summary.json")
        drawings = geometry.draw(mine := tidy[tidy.arm == arm])
        if (path := run.geometry(str(arm)) / "trajectory.csv").exists():
            drawings |= geometry.draw_trajectory(read_table(path))
        found.append(
            {
                "arm": arm,
                "rows": rows_of(part),
                "unmoved": geometry.is_unmoved(about),
                "left_out": geometry.left_out(run.geometry(str(arm))),
                "reasons": geometry.unmeasured(mine),
                "figures": add_drawings(drawn, f"geometry-{arm}", drawings),
            }
        )
    return found


def _overlap_context(run: RunFolder, drawn: dict[str, str]) -> list[tuple[str, str]]:
    """(figure name, caption) of the overlap of arms, if there is one."""
    path = run.root / "geometry" / "overlap.csv"
    found = geometry.draw_overlap(read_table(path)) if path.exists() else {}
    return add_drawings(drawn, "geometry", found)


def _teachers_of(config: ExperimentConfig) -> str:
    """The teachers by name and model, or `no teacher`."""
    if config.teacher is None:
        return "no teacher"
    names = [f"{name} {about.model}" for name, about in config.teachers.items()]
    return ", ".join(names) + ("" if len(names) == 1 else f" ({config.teacher.type})")
