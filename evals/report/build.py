"""A run folder -> report/: report.html (one self-contained file), report.md, figures/, tables/.

Reads files only. What a run lacks (an image, a teacher, the geometry) is left out of the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from evals.report import examples, figures, geometry, tables
from evals.report.verdict import interval, p_value, percent, points
from evals.roles import roles_of
from vlopd.config.experiment import ExperimentConfig
from vlopd.digests import digest_files
from vlopd.files import read_json, whole_folder, write_json
from vlopd.run.folder import RunFolder, up_to_date

Context = dict[str, Any]


def build_report(run: RunFolder, config: ExperimentConfig) -> Path:
    """Writes RUN/report/, unless what it shows is unchanged, and returns the path of report.html.

    Raises RunError when run.json is missing or a file of the run cannot be read.
    """
    inputs = shown_files(run)
    for artifact in run.checksums.artifacts():
        if artifact.split("/")[0] not in ("report", "compare"):
            run.checksums.check(artifact, whole=False)
    unaltered = not any(run.checksums.problems("report", whole=False))
    if up_to_date(run.report / "record.json", inputs) and unaltered:
        return run.report / "report.html"
    none = {"tasks": {}, "verdict": [f"Not compared yet: run `vlopd compare {run.root}`."]}
    compared = read_json(run.compare) if run.compare.exists() else none
    records, roles = tables.arm_records(run, config), roles_of(config).of
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
    data["probes"], data["alignment"] = tables.vision(run)
    drawn: dict[str, str] = {}
    context: Context = {
        "run": run.root.resolve().name,
        "config": config,
        "teachers": teachers_of(config),
        "config_json": json.dumps(config.model_dump(mode="json"), indent=1),
        "record": read_json(run.root / "run.json"),
        "records": records,
        "compared": compared,
        "tasks": [task_context(run, name, compared, data, drawn) for name in compared["tasks"]],
        "training": training_context(data["training"]),
        "curves": training_curves(data["training"], roles, drawn),
        "held_out": rows_of(data["held_out"]),
        "probes": rows_of(data["probes"]),
        "alignment": rows_of(data["alignment"]),
        "masks": rows_of(data["masks"]),
        "identity": rows_of(data["identity"]),
        "geometry": geometry_context(run, tidy, data["geometry"], drawn),
        "overlap": overlap_context(run, drawn),
        "generations": examples.generations(run, shown),
        "figures": drawn,
    }
    run.checksums.start("report", run.report / "record.json")
    with whole_folder(run.report) as folder:
        (folder / "figures").mkdir()
        (folder / "tables").mkdir()
        for name, svg in drawn.items():
            (folder / "figures" / f"{name}.svg").write_text(figures.standalone(svg))
        for name, table in data.items():
            if not table.empty:
                table.to_csv(folder / "tables" / f"{name}.csv", index=False)
        for name in ("report.html", "report.md"):
            text = environment().get_template(f"{name}.j2").render(context)
            (folder / name).write_text(text)
        write_json(folder / "record.json", {"inputs": inputs})
    run.checksums.write("report", [path for path in run.report.rglob("*") if path.is_file()])
    return run.report / "report.html"


def shown_files(run: RunFolder) -> dict[str, str]:
    """Digests of everything the report is made from, the report's own code included."""
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


def task_context(
    run: RunFolder,
    task: str,
    compared: Context,
    data: dict[str, pd.DataFrame],
    drawn: dict[str, str],
) -> Context:
    """What the report says about one task; its figures go into `drawn`."""
    entry = compared["tasks"][task]
    rows = data["arms"][data["arms"].task == task]
    chance = (entry["chance"] or {}).get("all")
    slug = "".join(c if c.isalnum() else "-" for c in task)
    share = f"{100 * compared['confidence']:g} % interval"
    scores = figures.dots(rows, chance, f"{entry['metric']} (%), {share}")
    draw(drawn, f"scores-{slug}", scores)
    differences = rows[rows.role != "full"].dropna(subset=["difference_mean"])
    if not differences.empty:
        names = {f"difference_{key}": key for key in ("mean", "low", "high")}
        plotted = differences[["arm", "role", *names]].rename(columns=names)
        forest = figures.forest(plotted, f"difference to full OPD (percentage points), {share}")
        draw(drawn, f"differences-{slug}", forest)
    draw_density(rows, slug, f"{entry['metric']} (%)", drawn)
    kinds, seeds, passes = data["kinds"], data["seeds"], data["pass_at"]
    return {
        "name": task,
        "slug": slug,
        "chance": chance,
        "entry": entry,
        "rows": rows_of(rows),
        "contrasts": rows_of(data["contrasts"][data["contrasts"].task == task])
        if not data["contrasts"].empty
        else [],
        "kinds": kinds_context(kinds[kinds.task == task]) if not kinds.empty else None,
        "seeds": rows_of(seeds[seeds.task == task]) if not seeds.empty else [],
        "passes": passes_context(passes[passes.task == task]) if not passes.empty else None,
        "non_inferior": [
            {"arm": c["a"], **c["non_inferiority"]}
            for c in entry["contrasts"]
            if "non_inferiority" in c
        ],
        "questions": examples.questions(run, task, entry),
        "no_answer": [
            (arm, its["extraction_failure_fraction"])
            for arm, its in entry["arms"].items()
            if (its["extraction_failure_fraction"] or 0) > 0.01
        ],
    }


def draw_density(rows: pd.DataFrame, slug: str, label: str, drawn: dict[str, str]) -> None:
    """Accuracy against density, where arms under masks have several."""
    masked = rows[rows.role.isin(("subnetwork", "random", "transplant")) & (rows.density > 0)]
    if masked.density.round(6).nunique() < 2:
        return
    edges = rows[rows.role.isin(("full", "base", "teacher"))]
    lines = dict(zip(edges.arm, edges["mean"], strict=True))
    draw(drawn, f"density-{slug}", figures.against_density(masked, lines, label))


def passes_context(passes: pd.DataFrame) -> Context:
    """Arms down, k across."""
    return {
        "names": list(dict.fromkeys(passes.metric)),
        "rows": [(arm, rows_of(part)) for arm, part in passes.groupby("arm", sort=False)],
    }


def kinds_context(kinds: pd.DataFrame) -> Context | None:
    """Arms down, question kinds across."""
    if kinds.empty:
        return None
    first = kinds[kinds.arm == kinds.arm.iloc[0]]
    return {
        "names": [(row.kind, row.n) for row in first.itertuples()],
        "chance": [row.chance for row in first.itertuples()] if first.chance.notna().any() else [],
        "rows": [(arm, rows_of(part)) for arm, part in kinds.groupby("arm", sort=False)],
    }


CURVES = {
    "kl": ("KL to the teacher", "KL(student || teacher), nats/token"),
    "reward": ("Reward", "mean reward of the student's samples"),
    "loss": ("Loss", "training loss"),
}
"""What the training curves show: the first of which there are values."""


def training_context(training: pd.DataFrame) -> list[Context]:
    """The state at the end of each arm's training: means over its last tenth of steps."""
    if training.empty:
        return []
    ends = []
    for arm, part in training.groupby("arm", sort=False):
        last = part.tail(max(1, len(part) // 10)).mean(numeric_only=True)
        seconds = float(part["seconds"].sum()) if "seconds" in part else None
        known = {"kl": None, **last.dropna().to_dict()}
        ends.append({**known, "arm": arm, "steps": len(part), "seconds": seconds})
    return ends


def training_curves(
    training: pd.DataFrame, roles: Mapping[str, str], drawn: dict[str, str]
) -> Context | None:
    """Draws the training curves; their title and the label of their values."""
    for value, (title, label) in CURVES.items():
        if value in training and training[value].notna().any():
            known = training.dropna(subset=[value])
            draw(drawn, "training", figures.curves(known, roles, value, label))
            return {"title": title, "label": label}
    return None


def geometry_context(
    run: RunFolder, tidy: pd.DataFrame, summary: pd.DataFrame, drawn: dict[str, str]
) -> list[Context]:
    """Per arm: the summary beside its nulls, what could not be measured, and figures."""
    if summary.empty:
        return []
    found = []
    for arm, part in summary.groupby("arm", sort=False):
        mine = tidy[tidy.arm == arm]
        tensors = mine[(mine.status != "ok") & ~mine.name.str.startswith("[")]
        reasons = tensors.groupby("reason").name.nunique().to_dict()
        drawings = geometry.draw(mine)
        if (run.geometry(str(arm)) / "trajectory.csv").exists():
            table = pd.read_csv(run.geometry(str(arm)) / "trajectory.csv")
            drawings |= geometry.draw_trajectory(table)
        shown = []
        for name, drawing in drawings.items():
            draw(drawn, f"geometry-{arm}-{name}", drawing.figure)
            shown.append((f"geometry-{arm}-{name}", drawing.words))
        left_out = geometry.left_out(run.geometry(str(arm)))
        found.append(
            {
                "arm": arm,
                "rows": rows_of(part),
                "left_out": left_out,
                "reasons": reasons,
                "figures": shown,
            }
        )
    return found


def overlap_context(run: RunFolder, drawn: dict[str, str]) -> list[tuple[str, str]]:
    """(figure name, what it shows) of the overlap of arms, where there is one."""
    path = run.root / "geometry" / "overlap.csv"
    found = geometry.draw_overlap(pd.read_csv(path)) if path.exists() else {}
    for name, drawing in found.items():
        draw(drawn, f"geometry-{name}", drawing.figure)
    return [(f"geometry-{name}", drawing.words) for name, drawing in found.items()]


# ----------------------------------------------------------------------------------------- helpers


def draw(drawn: dict[str, str], name: str, figure: Figure) -> None:
    drawn[name] = figures.to_svg(figure, name)


def rows_of(table: pd.DataFrame) -> list[Context]:
    """Rows as dicts, None where a cell is empty."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def environment() -> Environment:
    """Jinja with the report's number formats as filters."""
    env = Environment(
        loader=PackageLoader("evals.report", "."),
        autoescape=select_autoescape(["html", "html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        percent=percent,
        points=points,
        p_value=p_value,
        significant=lambda x: "-" if x is None else f"{x:.4g}",
        count=lambda x: "-" if x is None else f"{int(x):,}",
        bracket=lambda low, high, scale=1, form=".2f": interval(
            {"interval": [low, high]}, scale, form
        ).strip(),
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    )
    return env


def teachers_of(config: ExperimentConfig) -> str:
    """`teacher X`, all of several by name, or `no teacher`."""
    if config.teacher is None:
        return "no teacher"
    names = [f"{name} {about.model}" for name, about in config.teachers.items()]
    return ", ".join(names) + ("" if len(names) == 1 else f" ({config.teacher.type})")
