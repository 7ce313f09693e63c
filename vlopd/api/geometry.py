"""`vlopd.geometry`: measures the updates between any checkpoints against null models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from evals.report import geometry as drawings
from evals.report import tables
from evals.report.checkpoints import write_geometry_page
from evals.report.read import read_table
from vlopd.api.checkpoints import Checkpoint, folder_of, names_of, path_or_id, temporary_folder
from vlopd.config.analysis import GeometryConfig
from vlopd.config.input import value_of
from vlopd.digests import digest_checkpoint, digest_json, file_digest
from vlopd.errors import ConfigError
from vlopd.run.folder import up_to_date
from vlopd.run.schemas.read import read_record
from vlopd.update_geometry import paper
from vlopd.update_geometry.checkpoint import measure_checkpoint, read_rows
from vlopd.update_geometry.overlap import write_overlap
from vlopd.update_geometry.trajectory import step_of, write_trajectory
from vlopd.weights.checks import refuse_unlike_config

HEADLINE = ("trained", "label", "value", "null", "null_mean", "null_sd", "excess", "p")


@dataclass(frozen=True)
class Geometry:
    """The measured updates of one or more trained checkpoints: tables, figures and a page in the folder `out`."""

    out: Path
    folders: Mapping[str, Path]
    """Trained checkpoint -> folder of its geometry.csv, match.json and summary.json."""
    page: Path
    """The self-contained HTML page."""
    notes: Sequence[str] = ()
    """What qualifies the numbers, such as tensors stored in lower precision than in the base."""

    @cached_property
    def rows(self) -> pd.DataFrame:
        """geometry.csv of every checkpoint: one row per measure and null (docs/geometry.md)."""
        found = {name: read_table(path / "geometry.csv") for name, path in self.folders.items()}
        return pd.concat(found, names=["trained"]).reset_index("trained").reset_index(drop=True)

    @cached_property
    def headline(self) -> pd.DataFrame:
        """The main measures beside their nulls: value, null_mean, null_sd, excess and p."""
        rows = [
            {"trained": name, **row}
            for name, folder in self.folders.items()
            for row in tables.headline(folder)
        ]
        table = pd.DataFrame(rows)
        table["excess"] = table.value - table.null_mean if "null_mean" in table else None
        return table.reindex(columns=list(HEADLINE))

    @cached_property
    def overlap(self) -> pd.DataFrame:
        """overlap.csv of several checkpoints; empty for one."""
        return self._table("overlap")

    @cached_property
    def trajectory(self) -> pd.DataFrame:
        """trajectory.csv of the steps of one run; empty without `trajectory=True`."""
        return self._table("trajectory")

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The page's figures by name; of several checkpoints, NAME-figure."""
        found: dict[str, Figure] = {}
        for name, folder in self.folders.items():
            drawn = drawings.draw(read_table(folder / "geometry.csv"))
            prefix = f"{name}-" if len(self.folders) > 1 else ""
            found |= {f"{prefix}{key}": its.figure for key, its in drawn.items()}
        for table, draw in (
            (self.overlap, drawings.draw_overlap),
            (self.trajectory, drawings.draw_trajectory),
        ):
            found |= {} if table.empty else {key: its.figure for key, its in draw(table).items()}
        for figure in found.values():
            figure.set_facecolor("white")  # legible in dark notebooks too
        return found

    def plot(self, name: str | None = None) -> Figure:
        """The figure of a name; by default the spectrum of the update against its nulls.

        Raises ConfigError for an unknown name.
        """
        chosen = name or next((n for n in self.figures if n.endswith("spectrum")), None)
        chosen = chosen or next(iter(self.figures), "")
        if chosen not in self.figures:
            raise ConfigError(
                f"no figure {chosen!r}; there are {', '.join(self.figures) or 'none'}"
            )
        return self.figures[chosen]

    def _table(self, name: str) -> pd.DataFrame:
        path = self.out / f"{name}.csv"
        return read_table(path) if path.exists() else pd.DataFrame()

    def __repr__(self) -> str:
        return f"Geometry of {', '.join(self.folders)} in {self.out}\n{self._shown().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return self._shown().to_html(index=False, na_rep="", border=0)

    def _shown(self) -> pd.DataFrame:
        """The headline for display, with rounded numbers."""
        table = self.headline if len(self.folders) > 1 else self.headline.drop(columns="trained")
        numbers = table.select_dtypes("number").columns
        shown = {
            column: ["" if pd.isna(x) else f"{x:.4g}" for x in table[column]] for column in numbers
        }
        return table.assign(**shown)


def geometry(
    base: Checkpoint,
    *trained: Checkpoint,
    out: Path | str | None = None,
    trajectory: bool = False,
    preset: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    **settings: Any,
) -> Geometry:
    """Measures the updates from `base` to trained checkpoints or LoRA adapters, against null models.

    Writes geometry.csv, match.json and summary.json of each checkpoint (of several, in out/NAME/), figures, and the
    page geometry.html; of several also their overlap or, with `trajectory`, their evolution as steps of one run.

    Args:
        base: a folder, hub id, `builtin:NAME`, .gguf file, or the result of `distill`.
        trained: the same, or LoRA adapters of the base.
        out: folder for all files; a measurement there of the same inputs and settings is kept. None: a temporary one.
        trajectory: whether the trained checkpoints are steps of one training run.
        preset: "paper" for the settings and the summary table of arXiv 2606.13657.
        workers: threads; by default one per core.
        device: "cpu" or "cuda".
        settings: fields of the section `geometry` (docs/geometry.md): null_draws, nulls, ratios, ...

    Returns a Geometry. Raises ConfigError for invalid settings, RunError for paths that are no checkpoints, or of
    different models.

    >>> geometry("builtin:shapes-student", trained, null_draws=3).plot()
    """
    if not trained:
        raise ConfigError("geometry needs the base and one or more trained checkpoints")
    check_options(preset, workers, device)
    config = geometry_config(preset, settings)
    names = names_of(trained)
    before, *after = map(folder_of, (base, *trained))
    shown = dict(zip(names, map(path_or_id, trained), strict=True))
    steps = [step_of(Path(name), i) for i, name in enumerate(names)]
    if trajectory and len(set(steps)) < len(steps):
        raise ConfigError(f"the checkpoints' names end in the steps {steps}; they must differ")
    if trajectory and len(steps) < 2:
        raise ConfigError(
            "a trajectory needs two or more trained checkpoints, in the order of steps"
        )
    for path in (before, *after):
        refuse_unlike_config(path)
    out = temporary_folder() if out is None else Path(out)
    folders = {name: out if len(names) == 1 else out / name for name in names}
    digests = {path: digest_checkpoint(path, whole=True) for path in (before, *after)}
    notes = []
    for (name, folder), path in zip(folders.items(), after, strict=True):
        summary = _measure(before, path, folder, config, digests, workers, device)
        if drawings.is_unmoved(summary):
            notes.append(
                f"no coordinate of {shown[name]} differs from {path_or_id(base)}: its norms are zero, and shares, "
                'ranks and overlaps of a zero update are undefined, "-" in the tables'
            )
        if narrowed := summary["tensors_narrowed"]:
            notes.append(
                f"{narrowed} of {summary['tensors']} tensors are stored in lower precision in {shown[name]} than in "
                f"{path_or_id(base)}: their delta includes that rounding, which dominates small updates; "
                "round the base to the same dtype"
            )
    for stale in ("overlap", "trajectory"):  # of other checkpoints in the same folder
        for ending in ("csv", "parquet"):
            (out / f"{stale}.{ending}").unlink(missing_ok=True)
    if trajectory:
        tables_of_steps = dict(zip(steps, folders.values(), strict=True))
        by_step = dict(zip(steps, after, strict=True))
        write_trajectory(before, by_step, out, config, tables=tables_of_steps)
    elif len(names) > 1:
        own = {"base": digests[before], "trained": [digests[path] for path in after]}
        write_overlap(before, dict(zip(names, after, strict=True)), out, config, own)
    lines = {n: paper.paper_table(read_rows(its)) for n, its in folders.items()} if preset else {}
    titles = [column.title for column in paper.COLUMNS]
    page = write_geometry_page(out, path_or_id(base), folders, shown, notes, lines, titles)
    return Geometry(out, folders, page, tuple(notes))


def _measure(
    base: Path,
    trained: Path,
    folder: Path,
    config: GeometryConfig,
    digests: Mapping[Path, str],
    workers: int | None,
    device: str,
) -> dict[str, Any]:
    """Measures an update, unless its inputs and settings are those of the measurement in `folder`; its summary.json."""
    layouts = [its / "config.json" for its in (base, trained) if (its / "config.json").is_file()]
    inputs = {
        "base": digests[base],
        "trained": digests[trained],
        "configs": digest_json([file_digest(each) for each in layouts]),
        "settings": config.model_dump(mode="json"),
    }
    if not up_to_date(folder / "summary.json", inputs):
        measure_checkpoint(base, trained, folder, config, inputs, workers=workers, device=device)
    return read_record(folder / "summary.json")


def check_options(preset: str | None, workers: int | None, device: str) -> None:
    """Raises ConfigError for an unknown preset or device, a device that is missing here, or no workers."""
    if preset not in (None, "paper"):
        raise ConfigError(f"preset {preset}: must be paper")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers {workers}: must be at least 1")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device {device}: must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: there is none on this machine; use cpu")


def geometry_config(preset: str | None, settings: Mapping[str, Any]) -> GeometryConfig:
    """The settings of a measurement outside a run. Raises ConfigError for an unknown setting."""
    if "arms" in settings:
        raise ConfigError("arms: names arms of a run; give the trained checkpoints themselves")
    tree = paper.preset().model_dump() if preset else {}
    config: GeometryConfig = value_of(GeometryConfig, {**tree, "arms": (), **settings}, "geometry")
    if preset and (lacking := paper.lacking(config)):
        raise ConfigError(f"preset paper: {lacking}")
    return config
