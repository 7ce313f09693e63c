"""`vlopd geometry`: measures the updates of a run's arms, or of any checkpoints.

Heavy imports are inside the command, so that `--help` returns at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vlopd import pipeline
from vlopd.cli.common import (
    Trust,
    console,
    is_run,
    overrides_of,
    print_artifact,
    print_plan,
    refuse,
    settings_of,
)
from vlopd.errors import ConfigError
from vlopd.files import is_first_process
from vlopd.run.schemas.read import read_record

if TYPE_CHECKING:
    import pandas as pd

P = "p: whether the update is one more draw of the null, noise of the same norm; gaussian's rejects any optimizer"


def geometry(
    base: Annotated[
        str,
        typer.Argument(
            help="run folder, or the base checkpoint (folder, hub id, builtin:NAME, .gguf)"
        ),
    ],
    trained: Annotated[
        list[str] | None,
        typer.Argument(
            help="trained checkpoints or LoRA adapters (several: also their overlap); for a run, TOML overrides"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="for checkpoints: output folder; default geometry-<trained name>"),
    ] = None,
    trajectory: Annotated[
        bool,
        typer.Option("--trajectory", help="for checkpoints: they are steps of one training run"),
    ] = False,
    preset: Annotated[
        str | None, typer.Option(help="`paper`: print the paper's summary table")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="TOML override of section geometry, e.g. null_draws=5"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="threads; default one per core")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    trust: Trust = False,
) -> None:
    """Measures the geometry of the updates of a run's arms, or of any checkpoints, against null models."""
    if is_run(base):
        overrides = [*overrides_of(base, trained), *(f"geometry.{line}" for line in settings or ())]
        refuse({"--out": out}, f"the geometry of a run is in {base}/geometry; leave it out")
        refuse(
            {"--trajectory": trajectory},
            "a run's trajectories are measured wherever train.keep_steps keeps checkpoints; leave it out",
        )
        _geometry_of_run(Path(base), overrides, preset, workers, device, trust)
        return
    from vlopd.api.checkpoints import names_of
    from vlopd.api.geometry import geometry as measure

    if not trained:
        raise ConfigError(
            f"{base} is not a run folder (no run.json); for checkpoints give both, BASE and TRAINED"
        )
    names = names_of(trained)
    more = f"-and-{len(names) - 1}-more" if len(names) > 1 else ""
    found = measure(
        base,
        *trained,
        out=out or Path(f"geometry-{names[0]}{more}"),
        trajectory=trajectory,
        preset=preset,
        workers=workers,
        device=device,
        **settings_of(settings, ("base", "out", "trajectory", "preset", "workers", "device")),
    )
    for name, folder in found.folders.items():
        _print_headline(name, found.headline[found.headline.trained == name], folder)
        if preset:
            _print_paper_table(name, folder)
        print_artifact(f"geometry of {name}", folder / "geometry.csv", True)
    for note in found.notes:
        console.print(note, soft_wrap=True, highlight=False)
    for table in ("overlap", "trajectory"):
        if (found.out / f"{table}.csv").exists():
            print_artifact(table, found.out / f"{table}.csv", True)
    print_artifact("page", found.page, True)


def _geometry_of_run(
    target: Path,
    overrides: list[str],
    preset: str | None,
    workers: int | None,
    device: str,
    trust: bool,
) -> None:
    from vlopd.api.geometry import check_options
    from vlopd.update_geometry import paper

    check_options(preset, workers, device)
    folder, config = pipeline.prepare(target, overrides, trust=trust)
    if preset and (lacking := paper.lacking(config.geometry)):
        raise ConfigError(f"--preset paper: {lacking} (--set on the command line)")
    names = list(config.geometry.arms)
    if not names:
        raise ConfigError(
            f"{target}: geometry.arms is empty; name arms to measure, as in geometry.arms='[\"full\"]'"
        )
    planned = pipeline.plan(folder, config, names, "geometry")
    pipeline.begin(folder, config, planned, ("arms", "masks"), print_plan)
    pipeline.make_geometry(folder, config, names, print_artifact, workers, device)
    for name in names if preset and is_first_process() else ():
        _print_paper_table(name, folder.geometry(name))


def _print_headline(name: str, rows: pd.DataFrame, folder: Path) -> None:
    """Prints the main measures of an update beside each null."""
    import pandas as pd

    table = Table("measure", "update", "null: mean ± sd", "p", title=f"update of {name}")
    before = ""
    for row in rows.to_dict("records"):
        numbers = (row["value"], row["null_mean"], row["p"])
        value, mean, p = ("-" if pd.isna(x) else f"{x:.4g}" for x in numbers)
        spread = "" if pd.isna(row["null_sd"]) else f" ± {row['null_sd']:.2g}"
        null = f"{row['null'].replace('_', ' ')}: {mean}{spread}" if row["null"] else "-"
        again = row["label"] == before
        table.add_row("" if again else row["label"], "" if again else value, null, p)
        before = row["label"]
    console.print(table)
    no_p = read_record(folder / "summary.json")["no_p"]
    console.print(
        f"{no_p or P}. A value outside its null does not show that training on a "
        "signal made the difference: training on nothing has a similar spectrum (docs/geometry.md).",
        soft_wrap=True,
        highlight=False,
    )


def _print_paper_table(name: str, folder: Path) -> None:
    from vlopd.update_geometry import paper
    from vlopd.update_geometry.checkpoint import read_rows

    table = Table(name, *(column.title for column in paper.COLUMNS))
    for label, cells in paper.paper_table(read_rows(folder)):
        table.add_row(label, *cells)
    console.print(table)
