"""Commands on checkpoints outside a run: geometry of any two, comparison of any models."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from vlopd.cli.common import console, print_artifact, print_left_out
from vlopd.errors import ConfigError
from vlopd.files import read_json, shortest_distinct_names


def compare_folders(
    base: Path,
    trained: list[Path],
    out: Path,
    as_trajectory: bool,
    preset: str | None,
    settings: list[str],
    workers: int | None,
    device: str,
) -> None:
    from evals.report.geometry import write_figures
    from vlopd.config.analysis import GeometryConfig
    from vlopd.config.input import section_of
    from vlopd.digests import digest_checkpoint, digest_json, file_digest
    from vlopd.update_geometry import paper
    from vlopd.update_geometry.checkpoint import measure_checkpoint, read_rows
    from vlopd.update_geometry.overlap import write_overlap
    from vlopd.update_geometry.trajectory import step_of
    from vlopd.update_geometry.trajectory import write_trajectory as over_steps
    from vlopd.weights.checks import refuse_unlike_config

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: must be cpu or cuda")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if preset not in (None, "paper"):
        raise ConfigError(f"--preset {preset}: must be paper")
    tree = paper.preset().model_dump() if preset else {"arms": ()}
    config = section_of(GeometryConfig, tree, settings)
    labels = shortest_distinct_names([path.resolve().parts for path in trained])
    folders = {label: out if len(trained) == 1 else out / label for label in labels}
    steps = [step_of(path, i) for i, path in enumerate(trained)]
    if as_trajectory and len(set(steps)) < len(steps):
        raise ConfigError(f"the checkpoints' names end in the steps {steps}; they must differ")
    for path in (base, *trained):
        refuse_unlike_config(path)
    every = {path: digest_checkpoint(path, whole=True) for path in (base, *trained)}
    for path, (label, folder) in zip(trained, folders.items(), strict=True):
        layouts = [its / "config.json" for its in (base, path) if (its / "config.json").is_file()]
        digests = {"base": every[base], "trained": every[path]}
        digests["configs"] = digest_json([file_digest(each) for each in layouts])
        inputs = {**digests, "settings": config.model_dump(mode="json")}
        measure_checkpoint(base, path, folder, config, inputs, workers=workers, device=device)
        print_artifact(f"geometry of {label}", folder / "geometry.csv", True)
        summary = read_json(folder / "summary.json")
        if narrowed := summary["tensors_narrowed"]:
            console.print(
                f"{narrowed} of {summary['tensors']} tensors are stored in lower precision in {path} than in {base}: "
                "their delta includes that rounding, which dominates small updates; round the base to the same dtype"
            )
        print_left_out(folder)
        if preset:
            _print_paper_table(
                label, paper.paper_table(read_rows(folder)), [c.title for c in paper.COLUMNS]
            )
    if as_trajectory:
        tables = dict(zip(steps, folders.values(), strict=True))
        by_step = dict(zip(steps, trained, strict=True))
        print_artifact("trajectory", over_steps(base, by_step, out, config, tables=tables), True)
    elif len(trained) > 1:
        print_artifact(
            "overlap",
            write_overlap(base, dict(zip(labels, trained, strict=True)), out, config),
            True,
        )
    print_artifact("figures", write_figures(out, list(folders.values())), True)


def _print_paper_table(label: str, lines: list, titles: list[str]) -> None:
    table = Table(label, *titles)
    for name, cells in lines:
        table.add_row(name, *cells)
    console.print(table)


def compare_models(
    models: list[str], tasks: str | None, out: Path | None, settings: list[str], compute: str
) -> None:
    if tasks is None or out is None:
        raise ConfigError("comparing models needs --tasks a,b and --out DIR")
    from evals import compare_models
    from vlopd.config.analysis import EvalConfig
    from vlopd.config.input import section_of
    from vlopd.distributed import accelerator

    config = section_of(EvalConfig, {"tasks": tasks.split(",")}, settings)
    if compute not in ("fp32", "bf16"):
        raise ConfigError(f"--compute {compute}: must be fp32 or bf16")
    path = compare_models.compare_models(models, config, out, compute, accelerator().device)
    _print_comparison(read_json(path))
    print_artifact("comparison", path, True)


def _print_comparison(compared: dict) -> None:
    from evals.report.verdict import p_value, percent, points, verdict

    for task, entry in compared["tasks"].items():
        table = Table(
            task, entry["metric"], "standard error", "difference to the first", "p (Holm)"
        )
        first = next(iter(entry["arms"]))
        differences = {its["a"]: its for its in entry["contrasts"] if its["b"] == first}
        for name, its in entry["arms"].items():
            versus = differences.get(name)
            error = its["standard_error"]
            cells = ("", "") if versus is None else (points(versus), p_value(versus["p_holm"]))
            table.add_row(
                name, percent(its["mean"]), "-" if error is None else percent(error), *cells
            )
        console.print(table)
    for sentence in verdict(compared):
        console.print(sentence, soft_wrap=True, highlight=False)
